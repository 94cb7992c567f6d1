"""Builders that turn images and captions in common formats into datasets in TFDS format.

To add a format:

1. Copy the module in `formats/` that is nearest: `flickr.py` (annotations that name image files),
   `gqa.py` (one file of questions per split) or `webdataset.py` (a stream of image-caption pairs).
2. In its class `Dataset`, declare the options (`add_arguments`), construct the builder from them
   (`from_arguments`) and yield the examples. `base.ImageDataset` lists the methods; it checks,
   filters, deduplicates, counts and writes the examples.
3. Add the module's name to `FORMATS`, which makes it a command of tools/build_dataset.py.
"""

FORMATS = {
    "captions_json": "COCO-style captions (.json, .json.gz) with a folder or zip of images",
    "flickr": "Flickr8k or Flickr30k as published, with a list of images for each split",
    "karpathy": "captions in Karpathy's splits (dataset_coco.json, dataset_flickr8k.json, …)",
    "table": "images and captions in TSV, CSV or Parquet files",
    "webdataset": "tars of images with .txt or .json captions, as written by img2dataset",
    "cc3m": "Conceptual Captions 3M: the published list and images, or tars of img2dataset",
    "cc12m": "Conceptual 12M: the published list and images, or tars of img2dataset",
    "vizwiz": "captions marked as rejected or precanned where they are (VizWiz-Captions)",
    "vqav2": "questions about images with ten answers each (VQAv2, OK-VQA)",
    "gqa": "questions about images with one answer each (GQA)",
    "refcoco": "referring expressions with boxes in COCO's images (RefCOCO, RefCOCO+, RefCOCOg)",
    "visual_genome": "described regions of images (Visual Genome)",
    "nlvr2": "sentences that are true or false of two images (NLVR2)",
    "image_folder": "labeled images in one folder per class, in a folder or zip",
    "openimages": "images with the label files (CSV) of Open Images",
}
"""Name of a module in `formats` -> description of its input."""

ALIASES = {
    "captions_json": ("coco_captions",),
    "flickr": ("flickr8k", "flickr30k"),
    "table": ("tsv", "csv", "parquet"),
}
"""Other names of a format on the command line."""
