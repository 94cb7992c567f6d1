"""Images as a run sees them, and captions of them, with a learner that was read back, for tools."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from cap_pretrain import inputs, rng
from cap_pretrain.checkpoints.load import Learner
from cap_pretrain.data import images, pipeline
from cap_pretrain.data.text.tokenizers import encode_answer
from cap_pretrain.errors import UserError
from cap_pretrain.learners.protocols import WritesCaptions, learner_type
from cap_pretrain.models.decoding import Decoding, write_captions
from cap_pretrain.models.sizes import STORED

Captioner = Callable[[np.ndarray], list[str]]
Named = tuple[str, np.ndarray]  # an image uint8 [S, S, 3] with its name before it


def evaluation_crop(data: ConfigDict) -> str:
    """How a run with this `config.data` makes images square when it evaluates."""
    return "none" if data.crop == "none" else "center"


def read_image(path: str, data: ConfigDict) -> np.ndarray | str:
    """Returns the image as a run with this `config.data` sees its own when it evaluates.

    Returns:
      uint8 [S, S, 3], or why there is none.
    """
    try:
        return pipeline.square(Path(path).read_bytes(), data.image_size, evaluation_crop(data))
    except images.ImageError as error:
        return str(error)
    except OSError as error:
        return error.strerror or str(error)


def of_dataset(learner: Learner, data: str, split: str, count: int) -> list[Named]:
    """The first images of a split as the run sees them, with their ids; "" is the run's own.

    Raises:
      UserError: it has none, but features.
    """
    section = learner.config.data
    source = inputs.open_data(learner.config, split or section.eval_split, data)
    found = []
    for index in range(min(count, len(source))):
        example = source[index]
        image = example["image"]
        if not isinstance(image, bytes) and np.ndim(image) != 3:
            raise UserError(f"--data: {source} has stored features, and no images to draw on.")
        image = pipeline.square(image, section.image_size, evaluation_crop(section))
        found.append((example["id"], image))
    return found


def of_files(learner: Learner, paths: Sequence[str]) -> list[Named]:
    """The images of files as the run sees them; says of files without one why that is so."""
    found = []
    for path in paths:
        image = read_image(path, learner.config.data)
        if isinstance(image, str):
            print(f"{path}: not drawn: {image}", file=sys.stderr)
        else:
            found.append((Path(path).name, image))
    return found


def captioner(
    learner: Learner, how: Decoding, batch_size: int, seed: int, question: str = ""
) -> Captioner:
    """Returns a function from at most `batch_size` images [n, S, S, 3] to their captions.

    With a question the captions are answers to it.

    Raises:
      UserError: the learner writes no captions, or has no encoder to see images with.
    """
    config, tokenizer, graphdef, variables = learner
    if config.model.name == STORED:
        raise UserError(
            f"--checkpoint: learned from stored features ({config.data.name}) and has no encoder "
            "to see images with; take a run that was given the encoder itself."
        )
    if not issubclass(learner_type(graphdef), WritesCaptions):
        raise UserError(
            f"--checkpoint: is one of a {config.learner.name}, which writes no captions."
        )

    asked, given = encode_answer(tokenizer, question, None)
    prompt = np.tile(asked, (batch_size, 1)) if given else None

    @jax.jit
    def write(variables, pixels, keys):
        return write_captions(
            nnx.merge(graphdef, *variables),
            pixels,
            how,
            length=config.text.length,
            eos=tokenizer.eos_id,
            keys=keys,
            prompt=prompt,
        )

    done = 0

    def captions(pixels: np.ndarray) -> list[str]:
        nonlocal done
        keys = jax.vmap(lambda i: rng.key(seed, i, "captions"))(done + np.arange(batch_size))
        done += len(pixels)
        # All batches have one shape, so that one program is compiled.
        padding = [(0, batch_size - len(pixels)), *[(0, 0)] * 3]
        tokens = np.asarray(write(variables, np.pad(pixels, padding), keys))
        return [tokenizer.decode(ids[given:]) for ids in tokens[: len(pixels)]]

    return captions
