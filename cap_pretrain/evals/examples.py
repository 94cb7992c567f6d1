"""Examples of what a learner does, for the report of its run: made here, kept by `exhibits`."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import cv2
import jax
import numpy as np
from absl import logging

from cap_pretrain import rng
from cap_pretrain.data import views
from cap_pretrain.data.scenes.source import Scenes
from cap_pretrain.data.scenes.text import names_every_object
from cap_pretrain.data.sources.base import Source
from cap_pretrain.distributed import sharding
from cap_pretrain.errors import UserError
from cap_pretrain.evals.base import Context, Interrupted
from cap_pretrain.evals.exhibits import COUNT, Exhibit, Line, Panel, original
from cap_pretrain.evals.inference import word_maps
from cap_pretrain.learners.protocols import Attends, Illustrates

ATTENDED = 3
"""Images whose attention maps are drawn."""

WORDS = 10
"""Words of a caption whose attention maps are drawn at most."""

HEATED = 160
"""Attention maps of small images are enlarged by a whole factor, up to this side in pixels."""

COMPARED = 32
"""Examples among which neighbors are sought if the evaluation reads none."""


def attempted(context: Context, make: Callable[[], Iterable[Exhibit]]) -> tuple[Exhibit, ...]:
    """Return up to COUNT examples that `make` returns; if it fails, warn and return none.

    What people look at must not end a run. Outside a run, without a workdir, there are none, nor
    where a UserError says that they do not fit, as for a dataset without images.
    """
    if context.workdir is None:
        return ()
    try:
        return tuple(made for made, _ in zip(make(), range(COUNT), strict=False))
    except Interrupted:
        raise
    except UserError:
        return ()
    except Exception as error:  # of whatever kind
        logging.warning("No examples for the report: %s", error)
        return ()


def is_right(source: Source, index: int, caption: str) -> bool | None:
    """Return whether a caption is right, where that can be known: of scenes, else None."""
    if not isinstance(source, Scenes):
        return None
    return names_every_object(source.scene(index), caption)


def balanced(right: Mapping[Any, bool], count: int) -> list[Any]:
    """Return up to `count` keys, as evenly as possible right and wrong, in their order."""
    groups = [[key for key, own in right.items() if own is kind] for kind in (False, True)]
    few = min(map(len, groups))
    takes = [min(len(own), max(count - min(few, count // 2), count // 2)) for own in groups]
    chosen = {key for own, take in zip(groups, takes, strict=True) for key in own[:take]}
    return [key for key in right if key in chosen][:count]


def captioned(
    source: Source,
    captions: Iterable[tuple[int, str]],
    heat: Mapping[int, tuple[Panel, ...]] | None = None,
) -> Iterator[Exhibit]:
    """Yield images with their captions, whether these are right, references and attention maps."""
    for index, caption in captions:
        example = source[index]
        lines = [Line("caption", caption, is_right(source, index, caption))]
        if question := example.get("question", ""):
            lines.insert(0, Line("question", question))
        lines += [Line("reference", text) for text in list(dict.fromkeys(example["captions"]))[:3]]
        panels = (Panel(original(example["image"])), *(heat or {}).get(index, ()))
        yield Exhibit(str(example["id"]), panels, tuple(lines))


class WordHeat:
    """Draws where a learner looks for each word of a caption, over the image at its own size."""

    def __init__(self, context: Context, source: Source):
        able = context.able(Attends)
        self._context, self._source = able or context, source
        self._attends = able is not None
        self._attend = self._context.jit(lambda learner, *own: learner.attend(*own), hasty=True)

    def __call__(self, variables: Any, captions: Sequence[str]) -> dict[int, tuple[Panel, ...]]:
        """Return maps of the captions of the first images, by the image's index; {} if none."""
        if not self._attends or not captions:
            return {}
        tokenizer, mesh = self._context.tokenizer, self._context.mesh
        found = {}
        for batch, own in self._context.batches(self._source, len(captions), len(captions)):
            # Rows beyond the captions are padding.
            texts = [captions[i] if i < len(captions) else "" for i in own["index"].tolist()]
            rows = np.stack([tokenizer.encode(text) for text in texts])
            text = sharding.put_batch({"text": rows}, mesh)["text"]
            weights = np.asarray(self._attend(variables, batch["image"], text))
            for index, caption in enumerate(captions):
                ids = tokenizer.encode(caption)
                found[index] = tuple(self._panels(index, ids, weights[index], own["image"][index]))
            break
        return found

    def _panels(
        self, index: int, ids: np.ndarray, weights: np.ndarray, seen: np.ndarray
    ) -> Iterator[Panel]:
        words = word_maps.words_of(self._context.tokenizer, ids)[1][:WORDS]
        maps = word_maps.word_maps(weights, words, seen)
        image = self._source[index]["image"]
        data = self._context.config.data
        if data.crop == "none":
            image = original(image)
        else:  # the learner sees the central square only
            image = views.square(image, data.image_size, "center")
        brightest = max(float(np.max(maps, initial=0)), np.finfo(np.float32).tiny)
        for word, map_ in zip(words, maps, strict=True):
            yield Panel(heated(image, map_ / brightest), word.text)


def heated(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Draw a map [h, w] in [0, 1] in colors over a gray image [H, W, 3], enlarged if small."""
    factor = max(1, HEATED // max(image.shape[:2]))
    size = (factor * image.shape[1], factor * image.shape[0])
    gray = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)
    gray = cv2.resize(gray, size, interpolation=cv2.INTER_NEAREST)[..., None]
    smooth = np.clip(cv2.resize(heat, size, interpolation=cv2.INTER_CUBIC), 0, 1)
    colors = cv2.applyColorMap((255 * smooth).astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1]
    return (0.5 * gray + 0.5 * colors).astype(np.uint8)


class Illustrations:
    """Shows what a learner with a pretext task predicts for the first images of a source."""

    def __init__(self, context: Context, source: Source):
        able = context.able(Illustrates)
        self._context, self._source = able or context, source
        self._learner: Any = self._context.kind
        key = functools.partial(rng.key, context.config.seed, 0, "illustrations")
        self._illustrate = self._context.jit(
            lambda learner, batch: (learner.illustrate(batch, key()), batch["mask"]), hasty=True
        )

    def __call__(self, variables: Any) -> Iterator[Exhibit]:
        """Yield right and wrong examples."""
        if not issubclass(self._learner, Illustrates):
            return
        names = self._learner.panel_names()
        for batch, _ in self._context.batches(self._source, COMPARED, COMPARED):
            read = {name: batch[name] for name in ("image", "mask")}
            (panels, right), mask = jax.device_get(self._illustrate(variables, read))
            real = np.flatnonzero(mask).tolist()
            chosen = real if right is None else balanced({i: bool(right[i]) for i in real}, COUNT)
            for i in chosen:
                last = len(names) - 1
                shown = (
                    Panel(images[i], name, None if right is None or k < last else bool(right[i]))
                    for k, (images, name) in enumerate(zip(panels, names, strict=True))
                )
                yield Exhibit(str(self._source[i]["id"]), tuple(shown))


def neighbours(
    source: Source, query: int, label: str, found: Sequence[tuple[Source, int, str, bool]]
) -> Exhibit:
    """Return an image beside others: (their source, index, class, whether it is the same)."""
    panels = [Panel(original(source[query]["image"]), f"image: {label}")]
    for where, index, own, same in found:
        panels.append(Panel(original(where[index]["image"]), own, same))
    return Exhibit(str(source[query]["id"]), tuple(panels))
