"""Import of ResNets and AlexNet, without classifiers, under the names of torchvision or VISSL."""

import collections
import re
from collections.abc import Callable

from flax import nnx

from cap_pretrain import rules
from cap_pretrain.convert.encoder import Pretrained, nested
from cap_pretrain.convert.tables import Entry, Table, to_ours
from cap_pretrain.convert.weights import Weights
from cap_pretrain.errors import UserError
from cap_pretrain.models import convnet
from cap_pretrain.models.alexnet import AlexNet
from cap_pretrain.models.encoder import ImageEncoder
from cap_pretrain.models.layers import Compute
from cap_pretrain.models.resnet import ResNet
from cap_pretrain.models.sizes import ALEXNET, RESNETS, Stages

TRUNKS = ("trunk._feature_blocks.", "_feature_blocks.")  # of VISSL's model, and of its trunk
HEADS = ("fc.", "classifier.", "heads.")
_COUNTER = ".num_batches_tracked"  # of torch's BatchNorm, which uses it only without momentum

ALEXNET_NAMES: dict[str, Entry] = {  # convolutions in the sequence `features` of torchvision
    f"conv{n}": f"features.{place}" for n, place in enumerate((0, 3, 6, 8, 10), 1)
}


def read(weights: Weights) -> Pretrained | None:
    """Return the encoder, or None if it is another; raises UserError if it does not fit."""
    for prefix in TRUNKS:
        weights = weights.without(prefix)
    names = set(weights.names)
    if "conv1.weight" in names and "layer1.0.conv1.weight" in names:
        return _resnet(weights)
    found = {name.rpartition(".")[0] for name in names if name.startswith("features.")}
    if found == set(ALEXNET_NAMES.values()):
        return _assemble(weights, _alexnet, ALEXNET_NAMES, {"name": ALEXNET})
    return None


def _alexnet() -> AlexNet:
    return AlexNet(compute=Compute(), rngs=nnx.Rngs(0))


def resnet_names(stages: Stages) -> Table:
    """Return the table of a ResNet."""
    names: dict[str, Entry] = {"stem/conv": "conv1", "stem/norm": "bn1"}
    for stage, depth in enumerate(stages.depths, 1):
        for block in range(depth):
            ours, theirs = f"stage_{stage}/block_{block + 1}", f"layer{stage}.{block}"
            for unit in (1, 2, 3):
                names[f"{ours}/unit_{unit}/conv"] = f"{theirs}.conv{unit}"
                names[f"{ours}/unit_{unit}/norm"] = f"{theirs}.bn{unit}"
            names[f"{ours}/shortcut/conv"] = f"{theirs}.downsample.0"
            names[f"{ours}/shortcut/norm"] = f"{theirs}.downsample.1"
    return names


def _resnet(weights: Weights) -> Pretrained:
    blocks = {m.groups() for name in weights.names if (m := re.match(r"(layer\d)\.(\d+)\.", name))}
    counts = collections.Counter(stage for stage, _ in blocks)
    depths = counts["layer1"], counts["layer2"], counts["layer3"], counts["layer4"]
    stages = Stages(depths, bottleneck="layer1.0.conv3.weight" in weights.names)
    name = next((name for name, known in RESNETS.items() if known == stages), None)
    if name is None:
        raise UserError(
            f"{weights.where}: has a ResNet with {', '.join(map(str, depths))} blocks"
            f"{' of three convolutions' if stages.bottleneck else ''}, which is not one of "
            f"{', '.join(RESNETS)}."
        )
    stem = "small" if weights.shape("conv1.weight", 4)[-1] == 3 else "imagenet"

    def build() -> ResNet:
        return ResNet(stages, stem=stem, compute=Compute(), rngs=nnx.Rngs(0))

    return _assemble(weights, build, resnet_names(stages), {"name": name, "stem": stem})


def _assemble(
    weights: Weights, build: Callable[[], ImageEncoder], names: Table, model: dict[str, str]
) -> Pretrained:
    """Read parameters and batch statistics of the network that `build` returns."""
    params, stats = (
        {k: v.shape for k, v in rules.flatten(nnx.to_pure_dict(variables)).items()}
        for variables in nnx.state(nnx.eval_shape(build), nnx.Param, nnx.BatchStat)
    )
    weights.used.update(name for name in weights.names if name.endswith(_COUNTER))
    arrays = to_ours(weights, names, params | stats, ignored=HEADS)
    heads = sorted({name.partition(".")[0] for name in weights.names if name.startswith(HEADS)})
    left = f", without its {' and '.join(heads)}" if heads else ""
    return Pretrained(
        model=model,
        image_size=None,
        mean=convnet.MEAN,
        std=convnet.STD,
        params=nested({path: arrays[path] for path in params}),
        stats=nested({path: arrays[path] for path in stats}),
        source=f"{model['name']} under torchvision's names{left}",
    )
