"""Whether captions of unseen `scenes` images name every object's colour and shape."""

import dataclasses

from cap_pretrain.data.scenes.source import Scenes
from cap_pretrain.data.scenes.text import mentions, names_every_object
from cap_pretrain.errors import UserError
from cap_pretrain.evals.base import Context, Result
from cap_pretrain.evals.captions import Captioning
from cap_pretrain.models.decoding import Decoding


class SceneCaptions:
    """Share of captions that name each object, right in colour and shape, and no other."""

    @dataclasses.dataclass(frozen=True)
    class Options(Decoding):
        """Settings: how captions are decoded (see `Decoding`), and

        Attributes:
          split: of `scenes`: val, test, or novel (colour-shape pairs that training never shows).
          count: images that are captioned.
          batch_size: images a batch.
        """

        split: str = "val"
        count: int = 500
        batch_size: int = 100

    def __init__(self, context: Context, options: Options):
        self._source = context.source(options.split, "scenes")
        if not isinstance(self._source, Scenes):
            raise UserError("evals: scene_captions works on the dataset `scenes` only.")
        self._captioning = Captioning(
            context, self._source, batch_size=options.batch_size, limit=options.count, how=options
        )
        self._details = {
            "protocol": f"{options.described}; every object's colour and shape, and no other",
            "dataset": "scenes",
            "split": options.split,
        }

    def __call__(self, variables) -> Result:
        right, by_count, mistakes = 0, {}, []
        captions = list(self._captioning(variables))
        for index, caption in captions:
            scene = self._source.scene(index)
            named = names_every_object(scene, caption)
            right += named
            by_count.setdefault(len(scene.things), []).append(named)
            if not named:
                mistakes.append(
                    {
                        "index": index,
                        "caption": caption,
                        "mentioned": mentions(caption),
                        "true": [(thing.colour, thing.shape) for thing in scene.things],
                    }
                )
        accuracy = right / len(captions)
        figures = {"accuracy": accuracy}
        for count, results in sorted(by_count.items()):
            figures[f"accuracy_{count}_objects"] = sum(results) / len(results)
        line = (
            f"{right} of {len(captions)} captions of unseen images name every object's colour and "
            f"shape ({accuracy:.1%})"
        )
        details = self._details | {"images": len(captions), "mistakes": mistakes}
        return Result(figures, details, (line,))
