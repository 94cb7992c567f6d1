"""ResNets and AlexNet as torchvision has them, and ResNets as VISSL trains them.

A state dict says which of them it is. What it has behind the last feature map, such as a
classifier, is left behind.
"""

from collections.abc import Callable

from flax import nnx

from cap_pretrain import rules
from cap_pretrain.convert.encoder import Pretrained, nested
from cap_pretrain.convert.tables import Table, to_ours
from cap_pretrain.convert.weights import Weights
from cap_pretrain.errors import UserError
from cap_pretrain.models import convnet
from cap_pretrain.models.alexnet import AlexNet
from cap_pretrain.models.encoder import ImageEncoder
from cap_pretrain.models.layers import Compute
from cap_pretrain.models.resnet import ResNet
from cap_pretrain.models.sizes import ALEXNET, RESNETS, Stages

# What VISSL's names begin with: of the whole model, of its trunk.
TRUNKS = ("trunk._feature_blocks.", "_feature_blocks.")
HEADS = ("fc.", "classifier.", "heads.")
_COUNTER = ".num_batches_tracked"  # of torch's BatchNorm, which reads it only without momentum

# Of torchvision's `features`, which of them are convolutions.
ALEXNET_NAMES = {f"conv{n}": f"features.{place}" for n, place in enumerate((0, 3, 6, 8, 10), 1)}


def read(weights: Weights) -> Pretrained | None:
    """Returns the encoder of a state dict, or None if it is of none of these networks.

    Raises:
      UserError: it is, but of another shape, or weights are missing or unknown.
    """
    for prefix in TRUNKS:
        weights = weights.without(prefix)
    names = set(weights.names)
    if "conv1.weight" in names and "layer1.0.conv1.weight" in names:
        return _resnet(weights)
    found = {name.rpartition(".")[0] for name in names if name.startswith("features.")}
    if found == set(ALEXNET_NAMES.values()):
        build = lambda: AlexNet(compute=Compute(), rngs=nnx.Rngs(0))
        return _assemble(weights, build, ALEXNET_NAMES, {"name": ALEXNET})
    return None


def resnet_names(stages: Stages) -> Table:
    """Our modules and theirs."""
    names = {"stem/conv": "conv1", "stem/norm": "bn1"}
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
    blocks = {tuple(name.split(".")[:2]) for name in weights.names if name.startswith("layer")}
    depths = tuple(sum(stage == f"layer{n}" for stage, _ in blocks) for n in (1, 2, 3, 4))
    stages = Stages(depths, bottleneck="layer1.0.conv3.weight" in weights.names)
    name = next((name for name, known in RESNETS.items() if known == stages), None)
    if name is None:
        raise UserError(
            f"{weights.where}: holds a ResNet with {', '.join(map(str, depths))} blocks"
            f"{' of three convolutions' if stages.bottleneck else ''}, which is none of "
            f"{', '.join(RESNETS)}."
        )
    stem = "small" if weights.take("conv1.weight").shape[-1] == 3 else "imagenet"

    def build() -> ResNet:
        return ResNet(stages, stem=stem, compute=Compute(), rngs=nnx.Rngs(0))

    return _assemble(weights, build, resnet_names(stages), {"name": name, "stem": stem})


def _assemble(
    weights: Weights, build: Callable[[], ImageEncoder], names: Table, model: dict[str, str]
) -> Pretrained:
    params, stats = (
        {k: v.shape for k, v in rules.flatten(nnx.to_pure_dict(variables)).items()}
        for variables in nnx.state(nnx.eval_shape(build), nnx.Param, nnx.BatchStat)
    )
    counters = (name for name in weights.names if name.endswith(_COUNTER))
    arrays = to_ours(weights, names, params | stats, ignored=(*HEADS, *counters))
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
