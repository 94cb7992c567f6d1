"""Reference ResNets and AlexNet from torch's layers, with torchvision's parameter names.

Written from the description of the architectures; torchvision is not needed.
"""

from tests.parity import require

torch = require("torch")
nn = torch.nn

RESNETS = {
    "resnet18": (False, (2, 2, 2, 2)),
    "resnet34": (False, (3, 4, 6, 3)),
    "resnet50": (True, (3, 4, 6, 3)),
    "resnet101": (True, (3, 4, 23, 3)),
    "resnet152": (True, (3, 8, 36, 3)),
}


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)


class Block(nn.Module):
    def __init__(self, bottleneck: bool, inputs: int, width: int, stride: int):
        super().__init__()
        outputs = 4 * width if bottleneck else width
        self.conv1 = conv(inputs, width, *((1, 1) if bottleneck else (3, stride)))
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, stride if bottleneck else 1)
        self.bn2 = nn.BatchNorm2d(width)
        if bottleneck:
            self.conv3, self.bn3 = conv(width, outputs, 1), nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)
            )

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        if hasattr(self, "conv3"):
            y = self.bn3(self.conv3(y.relu()))
        return (y + (x if self.downsample is None else self.downsample(x))).relu()


class ResNet(nn.Module):
    """Return the feature maps of the four stages."""

    def __init__(self, name: str, small: bool = False):
        super().__init__()
        bottleneck, depths = RESNETS[name]
        self.conv1 = conv(3, 64, 3) if small else conv(3, 64, 7, 2)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        inputs = 64
        for stage, depth in enumerate(depths):
            width, blocks = 64 * 2**stage, []
            for block in range(depth):
                stride = 2 if stage and not block else 1
                blocks.append(Block(bottleneck, inputs, width, stride))
                inputs = 4 * width if bottleneck else width
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(inputs, 10)

    def forward(self, x):
        x, maps = self.maxpool(self.bn1(self.conv1(x)).relu()), []
        for stage in range(1, 5):
            x = getattr(self, f"layer{stage}")(x)
            maps.append(x)
        return maps


class AlexNet(nn.Module):
    """Return the maps after each ReLU, and the output of the last pooling."""

    def __init__(self):
        super().__init__()
        pool = nn.MaxPool2d(3, 2)
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), pool),
            *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), pool),
            *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), pool),
        )
        self.classifier = nn.Sequential(nn.Dropout(), nn.Linear(256 * 36, 10))

    def forward(self, x):
        maps = []
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                maps.append(x)
        return [*maps, x]


def make(name: str, small: bool = False) -> nn.Module:
    """Return a network without parameters at their initial zeros and ones."""
    torch.manual_seed(0)
    model = AlexNet() if name == "alexnet" else ResNet(name, small)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if key.endswith("running_var"):
                tensor.copy_(torch.rand_like(tensor) + 0.5)
            elif key.endswith("running_mean"):
                tensor.copy_(0.3 * torch.randn_like(tensor))
            elif tensor.ndim == 1 and tensor.is_floating_point():
                scale = ("bn" in key and key.endswith("weight")) or "downsample.1.weight" in key
                tensor.copy_(scale + 0.2 * torch.randn_like(tensor))
    return model.eval().requires_grad_(False)
