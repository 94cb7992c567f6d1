"""Turns images and captions as people have them into datasets in TFDS format.

A new format is one new module with a `Dataset` class (see `base.ImageDataset`) and one line here.
"""

FORMATS = {
    "captions_json": "COCO-style captions (.json, .json.gz) with a folder or zip of images",
    "flickr": "Flickr8k or Flickr30k as published, with lists of the images of each split",
    "karpathy": "captions in Karpathy's splits (dataset_coco.json, dataset_flickr8k.json, …)",
    "table": "images and captions in TSV, CSV or Parquet files",
    "webdataset": "tars of images with .txt or .json, as by img2dataset",
    "cc3m": "Conceptual Captions 3M: the published list and images, or tars of img2dataset",
    "cc12m": "Conceptual 12M: the published list and images, or tars of img2dataset",
    "vizwiz": "captions with marks for rejected and precanned ones (VizWiz-Captions)",
    "vqav2": "questions about images with ten answers each (VQAv2, OK-VQA)",
    "gqa": "questions about images with one answer each (GQA)",
    "nlvr2": "sentences that are true or false of two images (NLVR2)",
    "image_folder": "images in one folder a class, in a folder or zip",
    "openimages": "images with the csv files of labels of Open Images",
}
"""Name of the module in this package -> what it reads."""

ALIASES = {
    "captions_json": ("coco_captions",),
    "flickr": ("flickr8k", "flickr30k"),
    "table": ("tsv", "csv", "parquet"),
}
"""Other names by which a format is asked for."""
