"""Networks: the five networks of the benches, and their training data.

lenet300      784-300-100-10                      266,610 parameters    LeCun et al. 1998
lenet5        Caffe's variant, two convolutions   431,080               LeCun et al. 1998
resnet20      three stages of 16, 32, 64          272,186               He et al. 2016
vgg           eight convolutions, 32 to 256     1,175,210               Simonyan, Zisserman 2015
mobilenetv2   torchvision's, half as wide         700,202               Sandler et al. 2018

Weights: NAME.safetensors in the folder that TERSOR_NETWORKS names, else in bench/networks, else in
../shared/bench/models beside the repository. Data: Fashion-MNIST, in the folder that FASHION_MNIST names.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import MissingError, TaskError
from tersor.model.builtin_tasks import fashion_mnist
from tersor.model.task import Task

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = (ROOT / "bench" / "networks", ROOT.parent / "shared" / "bench" / "models")
DATA = "/usr/share/datasets/fashion-mnist"  # where Debian's package dataset-fashion-mnist puts it
THREADS = 2


class LeNet300(nn.Module):
    """Three linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(784, 300), nn.Linear(300, 100), nn.Linear(100, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc3(F.relu(self.fc2(x)))


class LeNet5(nn.Module):
    """Two convolutions without activations, each pooled, and two linear layers, of any width."""

    def __init__(self, first: int = 20, second: int = 50, hidden: int = 500) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, first, 5), nn.Conv2d(first, second, 5)
        self.fc1, self.fc2 = nn.Linear(second * 16, hidden), nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(x), 2)
        x = F.max_pool2d(self.conv2(x), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class Block(nn.Module):
    """Two convolutions and a skip, which is a 1 x 1 convolution if the shape changes."""

    def __init__(self, ins: int, outs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3(ins, outs, stride), nn.BatchNorm2d(outs)
        self.conv2, self.bn2 = conv3(outs, outs), nn.BatchNorm2d(outs)
        skip = [nn.Conv2d(ins, outs, 1, stride, bias=False), nn.BatchNorm2d(outs)]
        self.short = nn.Identity() if stride == 1 and ins == outs else nn.Sequential(*skip)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.short(x))


class ResNet20(nn.Module):
    """Three stages of three blocks; the second and third halve the image and double the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3(1, 16), nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = stage(16, 16, 1), stage(16, 32, 2), stage(32, 64, 2)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer1(F.relu(self.bn1(self.conv1(x))))
        x = self.layer3(self.layer2(x))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def conv3(ins: int, outs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(ins, outs, 3, stride, 1, bias=False)


def stage(ins: int, outs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(Block(ins, outs, stride), Block(outs, outs, 1), Block(outs, outs, 1))


def vgg() -> nn.Sequential:
    """Four pairs of convolutions; all but the last pair are pooled to half the size."""
    layers: list[nn.Module] = []
    ins = 1
    for width in (32, 64, 128, 256):
        for _ in range(2):
            layers += [conv3(ins, width), nn.BatchNorm2d(width), nn.ReLU()]
            ins = width
        layers.append(nn.MaxPool2d(2) if width < 256 else nn.AdaptiveAvgPool2d(1))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(ins, 10))


def mobilenetv2() -> nn.Module:
    """Torchvision's at half width, for one input channel and small images: the first stride is 1."""
    try:
        from torchvision.models import mobilenet_v2
    except ImportError:
        raise MissingError("bench: mobilenetv2 needs torchvision: pip install 'tersor[bench]'") from None
    net = mobilenet_v2(width_mult=0.5, num_classes=10, dropout=0.0)
    net.features[0][0] = conv3(1, net.features[0][0].out_channels)
    return net


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "lenet300": LeNet300,
    "lenet5": LeNet5,
    "resnet20": ResNet20,
    "vgg": vgg,
    "mobilenetv2": mobilenetv2,
}


def weights(name: str) -> Path:
    """The file with a network's trained weights. MissingError names the folders that were searched."""
    given = os.environ.get("TERSOR_NETWORKS")
    folders = (Path(given).expanduser(),) if given else FOLDERS
    for folder in folders:
        if (folder / f"{name}.safetensors").is_file():
            return folder / f"{name}.safetensors"
    places = " or ".join(str(folder) for folder in folders)
    raise MissingError(
        f"bench: no {name}.safetensors in {places}. Name the folder with the trained networks in "
        "TERSOR_NETWORKS."
    )


def load(name: str) -> nn.Module:
    """A trained network, in eval mode."""
    from safetensors.torch import load_file

    path = weights(name)
    net = NETWORKS[name]()
    net.load_state_dict(load_file(path))
    return net.eval()


def task(*, batch: int = 128, calibrate: int = 300) -> Task:
    """Fashion-MNIST. MissingError says how to get it."""
    folder = os.environ.get("FASHION_MNIST", DATA)
    try:
        return fashion_mnist(folder, batch=batch, calibrate=calibrate)
    except TaskError as error:
        raise MissingError(
            f"bench: {error} Install Debian's dataset-fashion-mnist, or name a folder with the four IDX "
            "files in FASHION_MNIST."
        ) from None


def percent(scores: Tensor) -> float:
    """Accuracy in percent, from one score an image."""
    return round(100 * float(scores.double().mean()), 2)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def steady() -> None:
    """The same number of threads everywhere: sums, and therefore trainings, depend on it."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", THREADS)))
