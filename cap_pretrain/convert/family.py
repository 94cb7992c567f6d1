"""What has to be known of a family of models that `transformers` writes."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from cap_pretrain.convert.tables import Table
from cap_pretrain.models.vit import Options


@dataclasses.dataclass(frozen=True)
class Family:
    """How `transformers` describes and names the vision models of one kind.

    Attributes:
      name: for people.
      prefix: of the names of the vision part's weights, where it is one of several.
      describe: from the config of the vision part to its options (activation and epsilon aside)
        and the names of its weights.
      ignored: what names of weights of other parts begin with.
      defaults: fields of the config that need not be in the file; see `huggingface.DEFAULTS`.
      mean, std: of its preprocessing, where no file says.
    """

    name: str
    prefix: str
    describe: Callable[[dict[str, Any]], tuple[Options, Table]]
    ignored: tuple[str, ...]
    defaults: Mapping[str, Any]
    mean: tuple[float, ...]
    std: tuple[float, ...]
