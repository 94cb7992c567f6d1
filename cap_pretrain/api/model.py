"""A trained model in Python: features, captions, scores and attention of images."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cap_pretrain import inputs, learners, rng, rules
from cap_pretrain.api import batches
from cap_pretrain.api.batches import positive
from cap_pretrain.api.images import Images, listed
from cap_pretrain.checkpoints.load import Learner
from cap_pretrain.data.text.tokenizers import encode_answer
from cap_pretrain.errors import UserError, did_you_mean
from cap_pretrain.evals.base import Context, ScoringOptions
from cap_pretrain.evals.inference import word_maps
from cap_pretrain.evals.inference.captioning import Caption, read_captions
from cap_pretrain.evals.inference.classes import TEMPLATES, ClassCaptions
from cap_pretrain.evals.inference.scoring import Scoring
from cap_pretrain.learners.protocols import (
    Attends,
    EmbedsText,
    Featurizes,
    ScoresTexts,
    WritesCaptions,
)
from cap_pretrain.models import readout
from cap_pretrain.models.decoding import Decoding, write_all
from cap_pretrain.models.layers import normalize_images
from cap_pretrain.models.sizes import STORED

PAIRS = 512
"""Pairs of an image and a text that a captioner scores at once, as the evaluators do."""

PROJECTED = "projected"

_NEEDS: dict[str, tuple[type, str]] = {
    "embed_text": (EmbedsText, "embeds no texts without an image"),
    "caption": (WritesCaptions, "writes no captions"),
    "score": (ScoresTexts, "scores no texts"),
    "zero_shot": (ScoresTexts, "scores no texts"),
    "attention": (Attends, "has no attention from words to parts of an image"),
}

RULES = {"likelihood": "", "over_prior": "_over_prior", "per_token": "_per_token"}
"""Names of the rules of `ClassCaptions`, and their suffixes there."""


class Classified(NamedTuple):
    """The best class of each of N images, and the scores of all K classes, float32 [N, K]."""

    names: list[str]
    scores: np.ndarray


class Attention(NamedTuple):
    """The words of a caption, and the map of each: float32 [words, H, W], each summing to 1.

    The maps cover what the model sees, a square or the whole image, row by row from its top left.
    """

    words: list[str]
    maps: np.ndarray


class Model:
    """A trained learner, or an encoder alone, ready to use; made by `cap_pretrain.load`.

    Images are what `api.images.Images` describes: uint8 arrays, images of Pillow, files, folders,
    or lists of these. They are cropped and resized as in the evaluation of the run. Batches are
    split over the devices and padded to a power of two, at most `batch_size`, so repeated calls
    compile nothing; results depend on `batch_size` only by rounding. All methods raise UserError,
    with the name of the file, if an image cannot be read, and for a method that the learner lacks.

    Attributes:
        path: Where the model comes from.
        config: The config of the run, locked.
        learner: Name of the learner, such as "captioner".
        image_size: Side in pixels of the squares that the model sees; see `View`.
        methods: Names of the methods that this learner has.
    """

    def __init__(self, learner: Learner, path: str = ""):
        self.path, self.config = path, learner.config
        self.learner = learner.config.learner.name
        self.image_size = learner.config.data.image_size
        self._tokenizer, self._variables = learner.tokenizer, learner.variables
        self._mesh = jax.tree.leaves(learner.variables)[0].sharding.mesh
        self._context = Context(learner.config, learner.graphdef, learner.tokenizer, self._mesh)
        self._programs: dict[Hashable, Any] = {}
        able = [name for name, (needed, _) in _NEEDS.items() if self._able(needed)]
        self.methods = ("embed", *able)

    def __repr__(self) -> str:
        """Return what the model is and can do."""
        return (
            f"Model({self.path!r}: {self.learner}, {self.config.model.name}, "
            f"{self.image_size} pixels; {', '.join(self.methods)})"
        )

    def embed(self, images: Images, *, what: str | None = None, batch_size: int = 64) -> np.ndarray:
        """Compute one vector per image.

        Args:
            images: See the class.
            what: "pooled", the encoder's pooled vector; "tokens", the mean of its tokens; one of
                its layers, such as "block_6", the mean of what that returns; or "projected", the
                output of the layers behind the encoder (a dual encoder's unit vector, comparable
                with `embed_text`; the last layer of the jigsaw network). By default "projected" for
                dual encoders, else "pooled".
            batch_size: Images at a time; affects speed and memory.

        Returns:
            float32 [N, D].
        """
        parts = [rows for _, rows in self.embed_batches(images, what=what, batch_size=batch_size)]
        return np.concatenate(parts)

    def embed_batches(
        self,
        images: Images,
        *,
        what: str | None = None,
        batch_size: int = 64,
        unreadable: dict[str, str] | None = None,
    ) -> Iterator[tuple[list[str], np.ndarray]]:
        """Yield the names and vectors of `embed` batch by batch, for many images.

        Args:
            images: See the class. The name of a file is its path.
            what: See `embed`, as for `batch_size`.
            batch_size: See `embed`.
            unreadable: Receives the reason for each image that cannot be read, by its name; such
                images are left out. Without it, the first one raises UserError.
        """
        what = what or self.default_vector

        def encode(learner: Any, pixels: jax.Array) -> jax.Array:
            if what == PROJECTED:
                return learner.features(pixels).astype(jnp.float32)
            return readout.read(learner.encoder, what, normalize_images(pixels, jnp.float32))

        needed = Featurizes if what == PROJECTED else None
        if needed and not self._able(needed):
            raise UserError(
                f"what: 'projected' needs layers behind the encoder, which a {self.learner} lacks; "
                f"{_able(Featurizes)} have them. Choose 'pooled' or 'tokens'."
            )
        program = self._compiled(("embed", what), encode, needed)
        yield from self._batches(
            images, batch_size, lambda pixels, _: program(self._variables, pixels), unreadable
        )

    @property
    def default_vector(self) -> str:
        """What `embed` computes by default, as `what` names it."""
        return PROJECTED if self._able(EmbedsText) else readout.POOLED

    @functools.cached_property
    def identity(self) -> str:
        """A hash of the weights: models with equal ones compute the same."""
        digest = hashlib.sha256()
        for path, leaf in sorted(rules.flatten(self._variables[0]).items()):
            digest.update(path.encode() + np.asarray(leaf).tobytes())
        return digest.hexdigest()[:16]

    def embed_text(self, texts: str | Sequence[str]) -> np.ndarray:
        """Embed texts as unit vectors float32 [M, D], for dual encoders; see `embed`."""
        self._check("embed_text")
        with jax.set_mesh(self._mesh):
            scoring = self._scoring(16)
            return scoring.text_features(self._variables, scoring.encode(_texts(texts, "texts")))

    def caption(self, images: Images, **options: Any) -> list[str]:
        """Write a caption of each image, the first of `captions`, with the same options."""
        return [several[0].text for several in self.captions(images, **options)]

    def captions(
        self,
        images: Images,
        *,
        beams: int | None = None,
        question: str = "",
        seed: int = 0,
        batch_size: int = 32,
        **decoding: Any,
    ) -> list[list[Caption]]:
        """Write captions of each image, or answers to a question, with their log-probabilities.

        Args:
            images: See the class.
            beams: Captions that beam search keeps; by default 4 with `method="beam"`, else 1.
            question: For runs that were trained on questions.
            seed: Of `method="sample"`. The captions of image i depend on the seed, i and the image.
            batch_size: Images at a time; affects speed and memory.
            **decoding: Further fields of `models.decoding.Decoding`, such as captions=5,
                method="sample", temperature=0.7 or min_length=5.
        """
        self._check("caption")
        how = _decoding(beams, decoding)
        ids, given = encode_answer(self._tokenizer, question, None)
        length, eos = self.config.text.length, self._tokenizer.eos_id

        def write(learner: Any, pixels: jax.Array, first: jax.Array, prompt: jax.Array):
            numbers = first + jnp.arange(len(pixels))
            keys = jax.vmap(lambda i: rng.key(seed, i, "captions"))(numbers)
            prompts = jnp.tile(prompt, (len(pixels), 1)) if given else None
            return write_all(
                learner, pixels, how, length=length, eos=eos, keys=keys, prompt=prompts
            )

        own = seed if how.method == "sample" else None
        program = self._compiled(("captions", how, own, bool(given)), write, WritesCaptions)

        def compute(pixels: jax.Array, first: int) -> Any:
            return program(self._variables, pixels, np.int32(first), ids)

        return [
            read_captions(self._tokenizer, tokens, log_p, given)
            for _, written in self._batches(images, batch_size, compute)
            for tokens, log_p in zip(written.tokens, written.log_p, strict=True)
        ]

    def score(
        self, images: Images, texts: str | Sequence[str], *, batch_size: int = 16
    ) -> np.ndarray:
        """Score how well each of M texts fits each of N images.

        Returns:
            float32 [N, M]: the cosine similarity for dual encoders; for captioners the
            log-likelihood of the text as the caption, in nats, which sums over its tokens.
        """
        self._check("score")
        with jax.set_mesh(self._mesh):
            scoring = self._scoring(batch_size)
            tokens = scoring.encode(_texts(texts, "texts"))
            return self._compared(images, scoring.text_features(self._variables, tokens), scoring)

    def zero_shot(
        self,
        images: Images,
        classes: Sequence[str],
        *,
        templates: Sequence[str] = TEMPLATES,
        rule: str = "likelihood",
        batch_size: int = 16,
    ) -> Classified:
        """Assign each image to the class whose name, put into captions, fits it best.

        Args:
            images: See the class.
            classes: Names of the classes, such as ["cat", "dog"].
            templates: Captions with {} in place of the name.
            rule: For captioners: "likelihood"; "over_prior", what the image adds to it, which
                helps if some names are rarer words than others; or "per_token". Dual encoders have
                the cosine with the mean of a class's captions. As in `evals/zero_shot.py`.
            batch_size: Images at a time; affects speed and memory.
        """
        self._check("zero_shot")
        if rule not in RULES:
            raise UserError(f"rule: {rule!r} is unknown.{did_you_mean(rule, RULES)}")
        if isinstance(classes, str):
            raise TypeError(f"classes: found the string {classes!r}; give a list of names.")
        names, forms = _texts(classes, "classes"), _texts(templates, "templates")
        if bad := [form for form in forms if "{}" not in form]:
            raise ValueError(f"templates: {bad[0]!r} has no {{}} where the name of the class goes.")
        with jax.set_mesh(self._mesh):
            scoring = self._scoring(batch_size)
            captions, scores_of = ClassCaptions(scoring, names, forms).prepared(self._variables)
            by_rule = scores_of(self._compared(images, captions, scoring))
        scores = by_rule[RULES[rule] if scoring.has_prior else ""]
        return Classified([names[k] for k in np.argmax(scores, axis=1)], scores)

    def attention(
        self, image: Images, caption: str = "", *, layer: int | str | None = None
    ) -> Attention:
        """Return where the model looks for each word of a caption of one image.

        Args:
            image: One image, see the class.
            caption: By default the model's own, by greedy decoding.
            layer: Decoder layer of a transformer, whose heads are averaged; "mean" averages over
                all layers. By default the last.
        """
        self._check("attention")
        one = listed(image)
        if len(one) != 1:
            raise ValueError(f"image: found {len(one)} images; give one.")
        options: dict[str, Any] = {}
        if layer is not None:
            options = {"layer": None if layer == "mean" else layer}
        able = self._able(Attends)
        word_maps.check_attends((able or self._context).kind, by_layer=bool(options))
        text = self._tokenizer.encode(caption or self.caption(one)[0])

        def attend(learner: Any, pixels: jax.Array, text: jax.Array) -> jax.Array:
            return learner.attend(pixels, jnp.tile(text, (len(pixels), 1)), **options)

        program = self._compiled(("attention", layer), attend, Attends)
        rows = self._each(one, 1, lambda pixels, _: program(self._variables, pixels, text))
        _, words = word_maps.words_of(self._tokenizer, text)
        seen: Any = one[0].read(inputs.view(self.config))
        return Attention([word.text for word in words], word_maps.word_maps(rows[0], words, seen))

    def _check(self, method: str) -> None:
        """Raise UserError if the learner lacks what a method needs."""
        needed, lacks = _NEEDS[method]
        if not self._able(needed):
            raise UserError(
                f"{method}: {self.path or 'the model'} is a {self.learner}, which {lacks}; "
                f"{_able(needed)} can."
            )

    def _able(self, needed: type) -> Context | None:
        """Return the context of the learner, or of a part of it, that has a protocol's methods."""
        return self._context.able(needed)

    def _compiled(
        self, key: Hashable, fn: Callable[..., Any], needed: type | None = None
    ) -> Callable[..., Any]:
        """Return `fn(learner, *arrays)` compiled, the same program for the same key.

        The learner is the one, or the part, that has the methods of `needed`, if given.
        """
        if key not in self._programs:
            context = (self._able(needed) if needed else None) or self._context
            self._programs[key] = context.jit(fn)
        return self._programs[key]

    def _scoring(self, batch_size: int) -> Scoring:
        key = ("scoring", positive(batch_size))
        if key not in self._programs:
            self._programs[key] = Scoring(
                self._context, ScoringOptions(batch_size=batch_size, pairs=PAIRS)
            )
        return self._programs[key]

    def _compared(self, images: Images, texts: np.ndarray, scoring: Scoring) -> np.ndarray:
        """Return the scores [N, M] of images and what `Scoring.text_features` returned."""

        def compare(pixels: jax.Array, _: int) -> np.ndarray:
            features = scoring.image_features(self._variables, pixels)
            return scoring.compare(self._variables, features, texts)

        return self._each(images, scoring.batch_size, compare)

    def _each(
        self, images: Images, batch_size: int, compute: Callable[[jax.Array, int], Any]
    ) -> np.ndarray:
        """Return the rows of `compute(pixels [B, S, S, 3], number of the first)`, [N, …]."""
        return np.concatenate([rows for _, rows in self._batches(images, batch_size, compute)])

    def _batches(
        self,
        images: Images,
        batch_size: int,
        compute: Callable[[jax.Array, int], Any],
        unreadable: dict[str, str] | None = None,
    ) -> Iterator[tuple[list[str], Any]]:
        """Yield the names and the rows of `_each`; `unreadable` as for `embed_batches`."""
        if self.config.model.name == STORED:
            raise UserError(
                f"{self.path}: was trained on stored features ({self.config.data.name}) and has no "
                "image encoder; load a run that has one."
            )
        work = batches.Work(inputs.view(self.config), self._mesh, positive(batch_size), compute)
        yield from batches.computed(listed(images), work, unreadable)


@functools.cache
def _able(needed: type) -> str:
    """Return the names of the learners that have the methods of a protocol."""
    names = [name for name in learners.REGISTRY if issubclass(learners.learner_class(name), needed)]
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _texts(given: str | Sequence[str], name: str) -> list[str]:
    """Return a list of texts; raise TypeError or ValueError if it is none."""
    texts = [given] if isinstance(given, str) else list(given)
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"{name}: found a {type(text).__name__}, {text!r}; give strings.")
    if not texts:
        raise ValueError(f"{name}: the list is empty.")
    return texts


def _decoding(beams: int | None, options: dict[str, Any]) -> Decoding:
    """Return the decoding that the arguments describe; raise TypeError for an unknown one."""
    known = [field.name for field in dataclasses.fields(Decoding)]
    for name in options:
        if name not in known:
            raise TypeError(f"caption: no option {name!r}.{did_you_mean(name, known)}")
    given = {} if beams is None else {"beams": beams}
    return Decoding(**{"method": "beam" if beams and beams > 1 else "greedy", **given, **options})
