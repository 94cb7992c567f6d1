"""`scenes`: the built-in dataset of captioned images, rendered on the fly.

Example i is a pure function of (split, i, options); nothing is stored or downloaded. The splits
train, val, test and novel have no scene in common. In novel, every object has a combination of
color and shape that the other three never show.
"""

import operator
from dataclasses import dataclass, fields
from random import Random
from typing import Any

from cap_pretrain.data.regions import Region
from cap_pretrain.data.scenes import expressions, text, world
from cap_pretrain.data.scenes.render import outline, render
from cap_pretrain.data.scenes.world import COLOURS, MAX_OBJECTS, OPPOSITE, SHAPES, Scene
from cap_pretrain.errors import UserError, did_you_mean

SPLITS = ("train", "val", "test", "novel")
LABELS = ("shape", "colour", "count", "relation")
LARGEST = 4096  # pixels; a larger image, drawn in float32, takes gigabytes

_RANGES: dict[str, tuple[float, float]] = {
    "min_objects": (1, MAX_OBJECTS),
    "max_objects": (1, MAX_OBJECTS),
    "colours": (2, len(COLOURS)),
    "shapes": (2, len(SHAPES)),
    "noise": (0.0, 0.5),
    **{f"length_{split}": (1, 2**40) for split in SPLITS},
}


@dataclass(frozen=True)
class ScenesOptions:
    """Content of the scenes and style of their captions.

    Attributes:
        min_objects: smallest number of objects in a scene, 1 to 3.
        max_objects: largest number of objects in a scene, `min_objects` to 3.
        smallest: smallest radius of an object as a fraction of the image's side. At the default,
            shapes can still be distinguished in images of 48 pixels. The upper limit is 0.3, 0.2 or
            0.14 for at most one, two or three objects.
        colours: number of colors (the first ones of `COLOURS`), 2 to 8.
        shapes: number of shapes (the first ones of `SHAPES`), 2 to 8.
        patterns: whether half of the objects are striped, dotted or checkered.
        backgrounds: whether backgrounds vary in brightness, tint and shading; if not, medium gray.
        noise: largest standard deviation of the pixel noise as a fraction of full scale, 0 to 0.5.
            Each image draws its own up to this.
        plain_captions: whether captions only list the color and shape of every object ("a red
            circle and a blue ring"). Of the other caption options, only `synonyms` then has an
            effect.
        partial_captions: whether some captions leave out objects, colors or shapes. If False, all
            five name every object's color and shape.
        relations: whether some captions state the relative position of objects.
        synonyms: whether captions use several words for the same concept.
        label: meaning of an example's `label`: shape or colour of the main (largest) object, count,
            or relation (of the main object to the second largest).
        length_train: number of examples in split train.
        length_val: in split val.
        length_test: in split test.
        length_novel: in split novel.
    """

    min_objects: int = 1
    max_objects: int = MAX_OBJECTS
    smallest: float = world.SMALLEST
    colours: int = len(COLOURS)
    shapes: int = len(SHAPES)
    patterns: bool = True
    backgrounds: bool = True
    noise: float = 0.04
    plain_captions: bool = False
    partial_captions: bool = True
    relations: bool = True
    synonyms: bool = True
    label: str = "shape"
    length_train: int = 1_000_000
    length_val: int = 10_000
    length_test: int = 10_000
    length_novel: int = 10_000

    def __post_init__(self) -> None:
        for field in fields(self):
            value: Any = getattr(self, field.name)
            wanted = field.type
            assert isinstance(wanted, type)  # not a string, as annotations are not postponed here
            kinds = (int, float) if wanted is float else wanted
            if not isinstance(value, kinds) or (wanted is not bool and isinstance(value, bool)):
                raise UserError(
                    f"scenes.{field.name} is {value!r}; it must be of type {wanted.__name__}."
                )
            if field.name not in _RANGES:
                continue
            low, high = _RANGES[field.name]
            if not low <= getattr(self, field.name) <= high:
                raise UserError(f"scenes.{field.name} is {value}; give {low} to {high}.")
        if self.min_objects > self.max_objects:
            raise UserError(
                f"scenes.min_objects is {self.min_objects}, above max_objects "
                f"({self.max_objects}); lower it or raise the other."
            )
        most = world.largest_smallest(self.max_objects)
        if not world.SMALLEST <= self.smallest <= most:
            raise UserError(
                f"scenes.smallest is {self.smallest}; with {self.max_objects} objects give "
                f"{world.SMALLEST} to {most:.2g}."
            )
        if self.label not in LABELS:
            raise UserError(
                f"scenes.label is {self.label!r}, which is unknown."
                f"{did_you_mean(self.label, LABELS)}"
            )


class Scenes:
    """The dataset as a random-access sequence of examples: a `Source`.

    The scenes are the same at every `image_size`, the side in pixels, 16 to 4096. `options` are
    fields of `ScenesOptions`, held by the attribute of that name. Raises UserError if a split or
    option is unknown, or a value is out of range; or, for novel, if the colors and shapes have
    fewer held-out pairs than a scene has objects.
    """

    Options = ScenesOptions

    def __init__(self, split: str, image_size: int = 64, **options: Any) -> None:
        if split not in SPLITS:
            raise UserError(f"scenes has no split {split!r}.{did_you_mean(split, SPLITS)}")
        if not isinstance(image_size, int) or not 16 <= image_size <= LARGEST:
            raise UserError(
                f"image_size is {image_size!r}; scenes draws 16 pixels or more, at most {LARGEST}."
            )
        known = [field.name for field in fields(ScenesOptions)]
        for name in options:
            if name not in known:
                raise UserError(f"scenes has no option {name!r}.{did_you_mean(name, known)}")
        self.split = split
        self.image_size = image_size
        self.options = ScenesOptions(**options)
        counts = (self.options.colours, self.options.shapes)
        seen = world.pairs_of(*counts, held_out=False)
        held_out = world.pairs_of(*counts, held_out=True)
        self._pairs = held_out if split == "novel" else seen
        self._pairs_in_negatives = seen + held_out if split == "novel" else seen
        if len(self._pairs) < self.options.max_objects:
            raise UserError(
                f"scenes.max_objects is {self.options.max_objects}, but the first "
                f"{self.options.colours} colours and {self.options.shapes} shapes have only "
                f"{len(self._pairs)} held-out pairs; raise scenes.colours and scenes.shapes."
            )

    def __str__(self) -> str:
        return f"scenes, split {self.split!r}"

    @property
    def class_names(self) -> list[str]:
        """Names of the values of an example's `label`."""
        return self.label_classes[self.options.label]

    @property
    def class_captions(self) -> list[str]:
        """A caption of each class, such as "a red shape" or "two shapes"."""
        return [text.label_caption(self.options.label, name) for name in self.class_names]

    class_templates = text.LABEL_TEMPLATES
    """Prompt templates in the style of the captions, with {} for one of `class_captions`."""

    @property
    def label_classes(self) -> dict[str, list[str]]:
        """Class names by kind of label, as in `Scene.labels()`."""
        return {
            "shape": list(SHAPES[: self.options.shapes]),
            "colour": list(COLOURS[: self.options.colours]),
            "count": [str(n + 1) for n in range(self.options.max_objects)],
            "relation": ["none", *OPPOSITE],
        }

    def __len__(self) -> int:
        return getattr(self.options, f"length_{self.split}")

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return example `index`: image uint8 [S, S, 3], five captions, label, id."""
        scene = self.scene(index)
        image = render(scene, self.image_size, self.options.noise)
        return {"image": image} | self._without_image(index, scene)

    def without_image(self, index: int) -> dict[str, Any]:
        """Return example `index` without its image, in a quarter of the time."""
        return self._without_image(index, self.scene(index))

    def _without_image(self, index: int, scene: Scene) -> dict[str, Any]:
        captions = text.captions(
            scene,
            self._rng(index, "captions"),
            plain=self.options.plain_captions,
            partial=self.options.partial_captions,
            relations=self.options.relations,
            synonyms=self.options.synonyms,
        )
        return {
            "captions": captions,
            "label": self.class_names.index(scene.labels()[self.options.label]),
            "id": f"{self.split}/{index}",
        }

    def regions(self, index: int) -> list[Region]:
        """Return an expression that fits only one object of example `index`, and its box, for each.

        See `expressions.write`; the box is the smallest one around the object.
        """
        scene, options = self.scene(index), self.options
        phrases = expressions.write(
            scene,
            self._rng(index, "regions"),
            plain=options.plain_captions,
            partial=options.partial_captions,
            relations=options.relations,
            synonyms=options.synonyms,
        )
        return [(p, outline(t)) for p, t in zip(phrases, scene.things, strict=True)]

    def scene(self, index: int) -> Scene:
        """Return the scene that example `index` shows."""
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"scenes/{self.split} has {len(self)} examples, so no number {index}")
        return world.draw_scene(
            self._rng(index, "scene"),
            self._pairs,
            min_objects=self.options.min_objects,
            max_objects=self.options.max_objects,
            smallest=self.options.smallest,
            patterns=self.options.patterns,
            backgrounds=self.options.backgrounds,
        )

    def negatives(self, index: int) -> dict[str, tuple[str, str]]:
        """Return hard negatives of example `index`: kind -> (true caption, false caption).

        Except in `novel`, false captions mention only color-shape pairs that occur in training; in
        all splits, only numbers of objects that occur. See `text.negatives`.
        """
        options = self.options
        counts = range(options.min_objects, options.max_objects + 1)
        return text.negatives(
            self.scene(index),
            self._rng(index, "negatives"),
            pairs=self._pairs_in_negatives,
            counts=counts if options.partial_captions else (),
            plain=options.plain_captions,
            relations=options.relations,
            synonyms=options.synonyms,
        )

    def _rng(self, index: int, purpose: str) -> Random:
        return Random(f"scenes/{self.split}/{index}/{purpose}")
