"""Measure a dataset and find the devices, without starting them."""

import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from cap_pretrain.data import images
from cap_pretrain.data.sources import passes
from cap_pretrain.data.sources.base import NoSplitError, Source, parse_mixture, without_image
from cap_pretrain.data.sources.open import GENERATED, cache_of, is_streamed, open_source
from cap_pretrain.data.text import tokenizers
from cap_pretrain.distributed import gpu, tpu
from cap_pretrain.errors import UserError
from cap_pretrain.small.rules import Devices, Facts, held_out, vocabulary

EXAMPLES = 1000
"""Examples, spread evenly over a dataset, whose captions are measured."""
PICTURES = 100
"""Examples among these whose image sizes are measured."""
LONGEST = 99.0
"""Percentile of the caption lengths that a row of text must hold."""

# Words that become wrong in a mirrored image.
_SIDES = re.compile(r"\b(left|right|leftmost|rightmost|lefthand|righthand)\b", re.IGNORECASE)
_DEVICES = re.compile(r"(cpu|gpu|tpu)-([1-9]\d{0,3})")


def devices_of(text: str) -> Devices:
    """Return the devices that "cpu-4" (cores), "gpu-1" or "tpu-4" names, or those present ("auto").

    Raises UserError if the text has another form.
    """
    if text == "auto":
        return present()
    match = _DEVICES.fullmatch(text)
    if not match:
        raise UserError(
            f"--config: devices={text!r} is not of the form cpu-CORES, gpu-NUMBER or tpu-NUMBER; "
            "omit it to use the devices of this machine."
        )
    return Devices(match[1], int(match[2]))


def present() -> Devices:
    """Return the devices of this machine, by their number and kind alone.

    JAX is not asked, since that would start them before the settings of a run are made. A TPU chip
    counts as one device, as it is from v4 on; give devices=tpu-8 for the four chips of a v3.
    """
    if gpu.will_be_used():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        found = len(visible.split(",")) if visible else len([*Path("/dev").glob("nvidia[0-9]*")])
        return Devices("gpu", max(1, found))
    if tpu.will_be_used():
        return Devices("tpu", tpu.chips())
    return Devices("cpu", os.cpu_count() or 1)


def measure(name: str) -> Facts:
    """Measure the training captions and images of a dataset, a path or a mixture of them.

    The same dataset always has the same facts. Reads EXAMPLES of each dataset, and trains a
    tokenizer on their captions to count tokens. Raises UserError if a dataset cannot be opened or
    has no captions.
    """
    names = [member for member, _ in parse_mixture(name)]
    sources = [_training_split(member) for member in names]
    total, kept_out = sum(map(len, sources)), 0
    if len(sources[0]) > 1 and getattr(sources[0], "splits", ()) == ("train",):
        kept_out = held_out(len(sources[0]))  # as `inputs` does with the first dataset
    opened = list(zip(names, sources, strict=True))
    chosen = [(source, _spread(member, source, EXAMPLES)) for member, source in opened]
    captions = [
        caption
        for source, indices in chosen
        for index in indices
        for caption in without_image(source, index)["captions"]
        if caption.strip()
    ]
    if not captions:
        raise UserError(
            f"--config: data={name!r} has no captions, and configs/small.py trains on captions; "
            "use configs/pretext.py to train on images alone."
        )
    sides = [  # generated images have any size
        side
        for member, source in opened
        if member not in GENERATED
        for side in _shorter_sides(source, _spread(member, source, PICTURES))
    ]
    each = len(captions) / sum(len(indices) for _, indices in chosen)
    total -= kept_out
    words = round(sum(len(text.split()) for text in captions) / len(captions) * each * total)
    characters = len(set("".join(captions).lower()))
    return Facts(
        images=total,
        held_out=kept_out,
        captions=round(each, 2),
        words=words,
        characters=characters,
        tokens=_usual_length(captions, vocabulary(words, characters)),
        side=int(np.median(sides)) if sides else 0,
        sided=round(sum(bool(_SIDES.search(text)) for text in captions) / len(captions), 4),
    )


def _training_split(name: str) -> Source:
    try:
        return open_source(name, "train", image_size=64, cache=cache_of(name))
    except NoSplitError as error:
        raise UserError(f"{error} configs/small.py trains on the split 'train'.") from error


def _spread(name: str, source: Source, most: int) -> list[int]:
    """Return at most `most` indices, spread over a source; blocks of what is not local."""
    return list(passes.sample(source, most, passes.BLOCK if is_streamed(name) else 0))


def _shorter_sides(source: Source, indices: Iterable[int]) -> Iterator[int]:
    """Yield the shorter side in pixels of some images; those that are damaged have none."""
    for index in indices:
        image = source[index]["image"]
        if not isinstance(image, bytes):
            if np.ndim(image) == 3:  # else features of an encoder, which the run refuses
                yield min(image.shape[:2])
            continue
        try:
            yield min(images.size(image))
        except images.ImageError:  # a run replaces it by a neighbor
            continue


def _usual_length(captions: list[str], vocab_size: int) -> int:
    """Return the number of tokens, EOS included, that LONGEST percent of the captions need."""
    with tempfile.TemporaryDirectory() as folder:
        model = tokenizers.train_sentencepiece(captions, folder, vocab_size)
        tokenizer = tokenizers.SentencePieceTokenizer(model, max_len=1024)
        lengths = [np.count_nonzero(tokenizer.encode(text)) for text in captions]
    return int(np.percentile(lengths, LONGEST, method="higher"))
