"""Examples of retrieval: the best captions of an image, and the best images for a caption."""

from collections.abc import Iterator

import numpy as np

from cap_pretrain.data.sources.base import Source, without_image
from cap_pretrain.evals import examples
from cap_pretrain.evals.exhibits import COUNT, Exhibit, Line, Panel, original

CANDIDATES = 64
"""Images and captions, the first ones, of which some right and some wrong are shown."""

BEST = 3
"""Results of a query that are shown, the best first."""


class Found:
    """Collects the best results of the first images and captions from rows of the score matrix.

    `texts`, int [M], are the numbers of the candidate captions; a captioner's `prior`, float [M],
    is subtracted from the scores where captions are ranked.
    """

    def __init__(self, texts: np.ndarray, prior: np.ndarray | None):
        self._texts, self._prior = texts, 0.0 if prior is None else prior
        self._of_image: dict[int, np.ndarray] = {}  # numbers of the best captions
        self._index: list[np.ndarray] = []
        self._columns: list[np.ndarray] = []

    def add(self, index: np.ndarray, scores: np.ndarray) -> None:
        """Add rows float32 [b, M] of the matrix, of the images `index`, int [b]."""
        self._index.append(index)
        self._columns.append(scores[:, :CANDIDATES].copy())  # a view would keep all of them
        missing = max(0, CANDIDATES - len(self._of_image))
        ranked = np.argsort(-(scores[:missing] - self._prior), axis=1, kind="stable")[:, :BEST]
        for image, best in zip(index.tolist(), ranked, strict=False):
            self._of_image[image] = self._texts[best]

    def exhibits(self, source: Source, owner: np.ndarray) -> Iterator[Exhibit]:
        """Yield queries of both directions; `owner`, int, is the image of each caption."""
        first = np.searchsorted(owner, owner)

        def caption(text: int) -> str:
            own = without_image(source, int(owner[text]))["captions"]
            return own[int(text - first[text])]

        right = {image: bool(owner[best[0]] == image) for image, best in self._of_image.items()}
        for image in examples.balanced(right, COUNT // 2):
            example = source[image]
            lines = [
                Line(f"{rank}.", caption(text), bool(owner[text] == image))
                for rank, text in enumerate(self._of_image[image], 1)
            ]
            if not any(line.right for line in lines):
                lines += [Line("its own", text) for text in example["captions"][:1]]
            title = f"captions of {example['id']}"
            yield Exhibit(title, (Panel(original(example["image"])),), tuple(lines))

        images, columns = np.concatenate(self._index), np.concatenate(self._columns)
        ranked = images[np.argsort(-columns, axis=0, kind="stable")[:BEST]]  # [BEST, texts]
        texts = self._texts[: columns.shape[1]]
        hits = {k: bool(ranked[0, k] == owner[text]) for k, text in enumerate(texts)}
        for k in examples.balanced(hits, COUNT // 2):
            panels = tuple(
                Panel(original(source[int(i)]["image"]), f"{n}.", bool(i == owner[texts[k]]))
                for n, i in enumerate(ranked[:, k], 1)
            )
            text = int(texts[k])
            of = without_image(source, int(owner[text]))["id"]
            title = f"images for caption {1 + text - first[text]} of {of}"
            yield Exhibit(title, panels, (Line("caption", caption(text)),))
