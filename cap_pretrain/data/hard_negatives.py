"""Hard negatives: true captions of images against false ones that differ only slightly."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from cap_pretrain.data.scenes.source import Scenes
from cap_pretrain.data.scenes.text import mentions
from cap_pretrain.data.sources.base import Source, without_image
from cap_pretrain.data.text.word_order import shuffles, words_of


@dataclass(frozen=True)
class Question:
    """A true caption of an image, and false ones by kind of mistake."""

    true: str
    false: Mapping[str, str]


class QuestionSet(Protocol):
    """Questions about the images of `source`; `protocol` says how false captions are made."""

    source: Source
    protocol: str

    def questions(self, index: int) -> list[Question]:
        """Return the questions about image `index`, possibly none. The result is deterministic."""


class SceneQuestions:
    """Captions of `scenes` against false ones of the same scene (see `Scenes.negatives`)."""

    protocol = "captions of scenes with one thing changed"

    def __init__(self, source: Scenes):
        self.source = source

    def questions(self, index: int) -> list[Question]:
        """Return the questions about scene `index`, one for each true caption."""
        by_true: dict[str, dict[str, str]] = {}
        for kind, (true, false) in self.source.negatives(index).items():
            by_true.setdefault(true, {})[kind] = false
        return [Question(true, false) for true, false in by_true.items()]


class OrderQuestions:
    """Each caption of a dataset against its words in other orders (see `word_order`)."""

    protocol = "the four shuffles of ARO, with the differences that data/word_order.py names"

    def __init__(self, source: Source):
        self.source = source
        # Captions of scenes are parsed, so that no false one names the same objects.
        self._same_meaning = _same_mentions if isinstance(source, Scenes) else None

    def questions(self, index: int) -> list[Question]:
        """Return one question for each caption of example `index` that can be shuffled."""
        found = []
        for k, caption in enumerate(without_image(self.source, index)["captions"]):
            false = shuffles(caption, f"{index}/{k}", self._same_meaning)
            if false:
                found.append(Question(" ".join(words_of(caption)), false))
        return found


def _same_mentions(caption: str, other: str) -> bool:
    return Counter(mentions(caption)) == Counter(mentions(other))
