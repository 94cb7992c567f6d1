"""The commands of the program `cap`.

A new command is a module here with `main(argv: list[str] | None = None) -> int`, which returns the
exit status, and one line in `REGISTRY`. --help shows the docstring of the module (see
`arguments.documented_parser`).
"""

from typing import NamedTuple


class Command(NamedTuple):
    """A command of `cap`: the module in this package, its group in `cap --help`, its purpose."""

    module: str
    group: str
    purpose: str


TRAIN, USE, DATA = "Train and evaluate", "Use a model", "Data"
LOOK, CHECK = "Look up", "Check"

REGISTRY = {
    "train": Command("train", TRAIN, "train a model as a config says, or resume a run"),
    "evaluate": Command("evaluate", TRAIN, "evaluate a run or a pretrained encoder"),
    "sweep": Command("sweep", TRAIN, "run a sweep, and tabulate or plot its results"),
    "report": Command("report", TRAIN, "make one page of runs: curves, examples, cost"),
    "results": Command("results_table", TRAIN, "print evaluation results of runs as a table"),
    "caption": Command("caption", USE, "caption image files, or answer questions about them"),
    "embed": Command("embed", USE, "store a vector for each image of a folder"),
    "search": Command("search", USE, "find the images nearest to a text or an image"),
    "export": Command("export_encoder", USE, "export an encoder for other libraries"),
    "attention": Command("show_attention", USE, "draw where a captioner looks for each word"),
    "colorize": Command("colorize", USE, "draw the colors that a run predicts for gray images"),
    "embeddings": Command("plot_embeddings", USE, "plot embeddings in two dimensions"),
    "score": Command("score_captions", USE, "score captions like the COCO evaluation"),
    "build": Command("build_dataset", DATA, "build a dataset from images and captions or labels"),
    "tokenizer": Command("train_tokenizer", DATA, "train a tokenizer on the captions of a dataset"),
    "features": Command("extract_features", DATA, "store an encoder's features as a dataset"),
    "sheet": Command("contact_sheet", DATA, "draw a grid of images with their captions"),
    "held_out": Command("held_out", DATA, "list test images, to exclude them from a build"),
    "permutations": Command("make_permutations", DATA, "generate permutations for the jigsaw task"),
    "configs": Command("configs", LOOK, "list the configs with their arguments"),
    "fields": Command("fields", LOOK, "print the documentation of config fields"),
    "check": Command("check_topology", CHECK, "predict memory and step time on TPUs or GPUs"),
    "compare": Command("compare_runs", CHECK, "compare two runs bit by bit"),
    "rehearse": Command("kill_and_resume", CHECK, "check that killed runs resume exactly"),
    "rehearse_build": Command("rehearse_build", CHECK, "check that killed builds resume exactly"),
}
"""Commands by the name that `cap` takes, in the order of `cap --help`; module names work, too."""
