"""Load images as a run preprocesses them and caption them with a restored learner."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from flax import nnx

from cap_pretrain import inputs, rng, untrusted
from cap_pretrain.checkpoints.load import Learner
from cap_pretrain.checkpoints.open import open_learner
from cap_pretrain.cli import arguments, figures
from cap_pretrain.data import images, views
from cap_pretrain.data.builders import files
from cap_pretrain.data.text.tokenizers import encode_answer
from cap_pretrain.data.views import View
from cap_pretrain.errors import UserError
from cap_pretrain.evals.inference.captioning import Caption, read_captions
from cap_pretrain.learners.protocols import WritesCaptions
from cap_pretrain.models.decoding import Decoding, write_all
from cap_pretrain.models.sizes import STORED

T = TypeVar("T")
Captioner = Callable[[np.ndarray], list[str]]
ScoredCaptioner = Callable[[np.ndarray], list[list[Caption]]]

PHOTO = 512
"""Longer side of a photo that is shown at most, in pixels."""


class Named(NamedTuple):
    """An image and its name.

    Attributes:
        name: Name of the file, or id of the example.
        image: What the learner reads, uint8 [S, S, 3] or patches [N, W] (`naflex`).
        photo: The image at its own size and aspect, but not above `PHOTO`, uint8 [H, W, 3].
    """

    name: str
    image: np.ndarray
    photo: np.ndarray


def read_image(path: str, view: View) -> np.ndarray | str:
    """Read an image file as a learner with this view sees it in evaluation.

    Returns the image, uint8 [S, S, 3] or patches [N, W], or the reason it cannot be read.
    """
    return _read(path, view)


def _read(path: str, use: Callable[[bytes], T]) -> T | str:
    """Return `use(content)` of an image file, or the reason it cannot be read."""
    try:
        with untrusted.open_regular(Path(path)) as file:
            return use(file.read())
    except images.ImageError as error:
        return str(error)
    except OSError as error:
        return error.strerror or str(error)


def image_paths(given: Sequence[str]) -> list[str]:
    """Return paths of files with the image files of each folder in its place, sorted by name.

    Raises UserError if a folder has no images.
    """
    found: list[str] = []
    for path in given:
        folder = Path(path).expanduser()
        if folder.is_dir():
            found += (str(folder / name) for name in files.image_names(files.open_files(folder)))
        else:
            found.append(path)
    return found


def dataset_images(learner: Learner, data: str, split: str, count: int) -> list[Named]:
    """Return up to `count` first images of a split, preprocessed for evaluation, with their ids.

    By default, "", data and split are those of the learner's run and its evaluation. Raises
    UserError if the dataset holds stored features instead of images.
    """
    section, view = learner.config.data, inputs.view(learner.config)
    source = inputs.open_data(learner.config, split or section.eval_split, data)
    found = []
    for index in range(min(count, len(source))):
        example = source[index]
        image = example["image"]
        if not isinstance(image, bytes) and np.ndim(image) != 3:
            raise UserError(f"--data: {source} holds stored features; choose one with images.")
        found.append(Named(example["id"], view(image), views.photo(image, PHOTO)))
    return found


def file_images(learner: Learner, paths: Sequence[str]) -> list[Named]:
    """Return the images of files, preprocessed for evaluation; report unreadable ones on stderr."""
    found = []
    view = inputs.view(learner.config)
    for path in paths:
        image = _read(path, lambda file: (view(file), views.photo(file, PHOTO)))
        if isinstance(image, str):
            print(f"{untrusted.printable(path)}: not drawn: {image}", file=sys.stderr)
        else:
            found.append(Named(Path(path).name, *image))
    return found


def draw_images(args: argparse.Namespace, draw: Callable[[Learner, list[Named]], Any]) -> int:
    """Draw the images that the arguments name and save the figure, or pages, of `draw`.

    `args` are those of `add_checkpoint`, `add_figure` and `add_images` in `cli.arguments`. Returns
    the exit status: 0 all images are drawn, 1 some files are unreadable, 2 all files are. Raises
    UserError if both files and a dataset are given, or one cannot be used, OSError if writing
    fails.
    """
    figures.check_name(args.out)
    if args.images and (args.data or args.split):
        raise UserError("--data, --split: cannot be combined with IMAGE files; give one of them.")
    paths = image_paths(args.images)
    with arguments.waiting(f"Loading {args.checkpoint}"):
        learner = open_learner(args.checkpoint, args.step)
    if paths:
        named = file_images(learner, paths)
    else:
        named = dataset_images(learner, args.data, args.split, args.count)
    if not named:
        return 2
    with arguments.waiting(f"Computing {len(named)} images"):
        drawn = draw(learner, named)
    with arguments.waiting(f"Drawing {args.out}"):
        pages = figures.save_pages(drawn if isinstance(drawn, list) else [drawn], args.out)
    for page in pages:
        print(f"wrote {page}")
    return int(len(named) < len(paths))


def captioner(
    learner: Learner, how: Decoding, batch_size: int, seed: int, question: str = ""
) -> Captioner:
    """Return a function that writes the first caption of each image; see `scored_captioner`."""
    write = scored_captioner(learner, how, batch_size, seed, question)
    return lambda pixels: [captions[0].text for captions in write(pixels)]


def scored_captioner(
    learner: Learner, how: Decoding, batch_size: int, seed: int, question: str = ""
) -> ScoredCaptioner:
    """Return a function that captions up to `batch_size` images, uint8 [n, S, S, 3].

    Smaller batches are padded; `seed` is for sampling. If there is a `question`, the captions are
    answers to it. Raises UserError if the learner cannot write captions, or has no image encoder.
    """
    config = learner.config
    if config.model.name == STORED:
        raise UserError(
            f"--checkpoint: trained on stored features ({config.data.name}) and has no image "
            "encoder; choose a run that was given the encoder itself."
        )
    able = learner.able(WritesCaptions)
    if able is None:
        raise UserError(
            f"--checkpoint: a {config.learner.name} cannot write captions; choose a captioner."
        )
    config, tokenizer, graphdef, variables = able

    prompt_ids, given = encode_answer(tokenizer, question, None)
    prompt = np.tile(prompt_ids, (batch_size, 1)) if given else None

    @jax.jit
    def write(variables, pixels, keys):
        return write_all(
            nnx.merge(graphdef, *variables),
            pixels,
            how,
            length=config.text.length,
            eos=tokenizer.eos_id,
            keys=keys,
            prompt=prompt,
        )

    done = 0

    def captions(pixels: np.ndarray) -> list[list[Caption]]:
        nonlocal done
        keys = jax.vmap(lambda i: rng.key(seed, i, "captions"))(done + np.arange(batch_size))
        done += len(pixels)
        # Every batch is padded to one shape, so only one program is compiled.
        padding = [(0, batch_size - len(pixels)), *[(0, 0)] * (pixels.ndim - 1)]
        written = jax.device_get(write(variables, np.pad(pixels, padding), keys))
        of_images = zip(written.tokens[: len(pixels)], written.log_p, strict=False)
        return [read_captions(tokenizer, tokens, log_p, given) for tokens, log_p in of_images]

    return captions
