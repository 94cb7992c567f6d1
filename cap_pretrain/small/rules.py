"""Rules that choose the settings of a small run, each with its reason in one line.

RESULTS.md ("Starting small") has the runs on which optimizer, learning rate, number of passes and
absence of dropout were chosen, on CPU cores and validation data. The other rules are conventions of
small models; those for GPUs extend them to larger ones.
"""

import dataclasses
import math
from typing import Any

CAPTIONERS = ("cap", "cappa", "coca")


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the rules depend on, of a dataset."""

    images: int  # that train
    held_out: int  # images held out of training; 0: the dataset has its own validation split
    captions: float  # of an image, on average
    words: int  # in all training captions
    characters: int  # that differ, in lower case
    tokens: int  # of a usual long caption with `vocabulary` pieces, EOS included
    side: int  # median of the shorter sides in pixels; 0: images are drawn at any size
    sided: float  # share of the captions that say left or right


@dataclasses.dataclass(frozen=True)
class Devices:
    """Devices of one kind, cpu, gpu or tpu; of a CPU, `count` is the number of cores."""

    kind: str
    count: int

    @property
    def parts(self) -> int:
        """Into how many equal parts a batch is cut; all cores share one part."""
        return 1 if self.kind == "cpu" else self.count

    def __str__(self) -> str:
        return f"{self.kind}-{self.count}"


@dataclasses.dataclass(frozen=True)
class Choice:
    """Config fields with their values, and a line that states them with the reason."""

    fields: dict[str, Any]
    line: str


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model and its images: square images of `side` pixels, cut into patches of `patch`."""

    side: int
    patch: int
    width: int
    depth: int
    decoder: int  # layers of the caption decoder

    @property
    def heads(self) -> int:
        """Heads of 32 units."""
        return self.width // 32


# From the smallest; the first whose number of images is not below that of the dataset is used.
SHAPES = {
    "cpu": (
        (2_000, Shape(64, 16, 128, 3, 2)),
        (20_000, Shape(96, 16, 128, 4, 2)),
        (math.inf, Shape(96, 16, 192, 4, 2)),
    ),
    "gpu": (
        (2_000, Shape(96, 16, 192, 4, 2)),
        (20_000, Shape(128, 16, 256, 6, 3)),
        (math.inf, Shape(192, 16, 384, 8, 4)),
    ),
}
BATCH = {True: {"cpu": 32, "gpu": 128}, False: {"cpu": 64, "gpu": 256}}
"""Largest batch of captioners (True) and of contrastive learners, which compare its examples."""
PASSES, PASSES_AT, SLOPE, LEAST_PASSES = 10, 1_000, 0.15, 5
"""How often a run shows each caption: PASSES for PASSES_AT captions; with more captions fewer, by a
power law with the exponent SLOPE, since there is less to gain from a repetition. With more passes
than this, few captions are learned by heart, and the validation loss rises."""
EXAMPLES_A_CORE, EXAMPLES_LEAST, EXAMPLES_GPU = 100_000, 200_000, 4_000_000
"""Most examples that a run shows, which bounds its time: for each core of a CPU, for a CPU with few
cores, and on GPUs."""
STEPS = {True: 300, False: 150}
"""Fewest steps, like BATCH, for which the batch is reduced."""
RATE, RATE_WIDTH = 3e-3, 128
"""Learning rate of AdamW at this width; it falls with the width."""
DECAY = 0.05
LONGEST_TEXT = 128
"""Most tokens of a caption; longer ones are cut."""
PARALLEL = 0.5
"""Share of parallel prediction in CapPa; the paper's 0.75 suits long runs (see quickstart.py)."""
SIDED = 0.01
"""Largest share of captions with left or right at which images are mirrored."""


def choose(facts: Facts, devices: Devices, objective: str) -> list[Choice]:
    """Return the choices for a dataset and devices, in the order in which they are printed."""
    shape = _shape(facts, devices)
    examples = _examples(facts, devices)
    batch = _batch(facts, devices, objective, examples)
    steps = max(1, round(examples / batch))
    return [
        _image_choice(facts, devices, shape),
        _model_choice(facts, devices, shape),
        _text_choice(facts),
        _batch_choice(devices, objective, batch),
        _length_choice(facts, devices, batch, steps),
        _optimizer_choice(shape),
        _augmentation_choice(facts),
        _evaluation_choice(facts),
    ]


def _captions(objective: str) -> bool:
    """Return whether an objective, or one of several joined by +, is that of a captioner."""
    return any(name in CAPTIONERS for name in objective.split("+"))


def held_out(images: int) -> int:
    """Return how many of all images validate, where a dataset has no split for that."""
    return min(1000, max(1, images // 10))


def vocabulary(words: int, characters: int) -> int:
    """Return the number of pieces for a text of so many words and different characters."""
    pieces = max(6 * math.sqrt(words), 2 * characters)
    return 2 ** min(15, max(9, round(math.log2(pieces))))


def _shape(facts: Facts, devices: Devices) -> Shape:
    """Return the model's shape, with images no larger than those of the dataset."""
    table = SHAPES["cpu" if devices.kind == "cpu" else "gpu"]
    shape = next(shape for most, shape in table if facts.images <= most)
    if not facts.side:
        return shape
    patches = max(2, min(shape.side, facts.side) // shape.patch)
    return dataclasses.replace(shape, side=patches * shape.patch)


def _examples(facts: Facts, devices: Devices) -> float:
    """Return how many examples a run shows."""
    most = EXAMPLES_GPU
    if devices.kind == "cpu":
        most = max(EXAMPLES_LEAST, EXAMPLES_A_CORE * devices.count)
    return min(most, passes(facts) * facts.images * facts.captions)


def _batch(facts: Facts, devices: Devices, objective: str, examples: float) -> int:
    """Return the batch size, a multiple of the parts that the devices cut it into.

    It leaves STEPS steps, and is at most a quarter of the dataset, so that a batch holds different
    images.
    """
    kind, captions = "cpu" if devices.kind == "cpu" else "gpu", _captions(objective)
    most = min(BATCH[captions][kind], examples / STEPS[captions], facts.images / 4)
    size = 2 ** int(math.log2(max(8, most)))
    return max(1, round(size / devices.parts)) * devices.parts


def _image_choice(facts: Facts, devices: Devices, shape: Shape) -> Choice:
    found = (
        f"the shorter side of a usual image is {facts.side}" if facts.side else "images are drawn"
    )
    why = f"a {devices.kind.upper()} with {facts.images:,} images; {found}"
    return Choice(
        {"data.image_size": shape.side},
        f"images: {shape.side} x {shape.side} pixels, whole ({why})",
    )


def _model_choice(facts: Facts, devices: Devices, shape: Shape) -> Choice:
    fields = {
        "model.name": f"mu/{shape.patch}",
        "model.width": shape.width,
        "model.depth": shape.depth,
        "model.mlp": 4 * shape.width,
        "model.heads": shape.heads,
        "model.decoder_depth": shape.decoder,
    }
    return Choice(
        fields,
        f"model: patches of {shape.patch}, width {shape.width}, {shape.depth} layers and "
        f"{shape.decoder} for text (what {facts.images:,} images can teach on {devices})",
    )


def passes(facts: Facts) -> float:
    """Return how often a run may show each caption before it learns them by heart."""
    captions = facts.images * facts.captions
    return max(LEAST_PASSES, PASSES * (PASSES_AT / captions) ** SLOPE)


def _text_choice(facts: Facts) -> Choice:
    pieces = vocabulary(facts.words, facts.characters)
    length = min(LONGEST_TEXT, max(8, 4 * math.ceil(facts.tokens / 4)))
    return Choice(
        {"text.vocab_size": pieces, "text.length": length},
        f"text: at most {pieces:,} pieces, {length} tokens ({facts.words:,} words in captions; "
        f"99 in 100 captions have at most {facts.tokens} tokens)",
    )


def _batch_choice(devices: Devices, objective: str, batch: int) -> Choice:
    most = BATCH[_captions(objective)]["cpu" if devices.kind == "cpu" else "gpu"]
    why = (
        f"as many as {devices} is fast with" if batch >= most else "so that there are enough steps"
    )
    if devices.parts > 1:
        why += f", a multiple of {devices.parts} devices"
    return Choice({"batch_size": batch}, f"batch: {batch} images ({why})")


def _length_choice(facts: Facts, devices: Devices, batch: int, steps: int) -> Choice:
    shown = steps * batch
    times = shown / (facts.images * facts.captions)
    enough = times >= 0.9 * passes(facts)
    why = "more would be learned by heart" if enough else f"the most for {devices}"
    line = (
        f"length: {steps:,} steps, {shown / facts.images:.3g} epochs (each caption {times:.2g} "
        f"times; {why})"
    )
    return Choice({"total_steps": steps, "log.every_steps": max(10, steps // 50)}, line)


def _optimizer_choice(shape: Shape) -> Choice:
    rate = float(f"{RATE * RATE_WIDTH / shape.width:.2g}")
    fields = {
        "optim.name": "adamw",
        "optim.lr": rate,
        "optim.b2": 0.95,
        "optim.weight_decay": DECAY,
        "optim.warmup_share": 0.05,
        "optim.decay": "cosine",
    }
    return Choice(
        fields,
        f"optimizer: AdamW, rate {rate:g} (for width {shape.width}), warm-up over 5% of the steps, "
        "then cosine decay (short runs learn faster than with Adafactor at 1e-3)",
    )


def _augmentation_choice(facts: Facts) -> Choice:
    flip = facts.sided <= SIDED
    mirrored = "half of the images are mirrored" if flip else "no image is mirrored"
    return Choice(
        {"data.flip": flip},
        f"augmentation: {mirrored} ({facts.sided:.1%} of the captions say left or right)",
    )


def _evaluation_choice(facts: Facts) -> Choice:
    fields = {
        "eval.every_share": 0.1,
        "checkpoint.every_share": 0.1,
        "checkpoint.every_minutes": 5.0,
        "data.held_out": facts.held_out or -1,
    }
    where = f"{facts.held_out:,} held-out images" if facts.held_out else "the validation split"
    return Choice(fields, f"evaluation: ten times, on {where} (for no longer than the training)")
