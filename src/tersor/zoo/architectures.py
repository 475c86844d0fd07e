"""Architectures: networks by name, with the task that suits each. Thin over torchvision, timm and others.

MODEL zoo:NAME builds one, untrained; TASK zoo:NAME is its task on composed scenes (scene_tasks.py)
--recipe zoo:NAME trains it, --recipe zoo:NAME:small compresses it then
Each is built for images of 96 x 96 pixels and for 10 classes (11 with the background), so that it trains on
one CPU in minutes. Weights come from a file (--weights) or a training (`tersor run zoo:NAME ... finetune`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from tersor.errors import SettingError, did_you_mean, need
from tersor.model.batches import seeded
from tersor.zoo.libraries import timm_model, torchvision_model
from tersor.zoo.scenes import CLASSES
from tersor.zoo.ssdlite import SsdLite
from tersor.zoo.yolo_lite import YoloLite

RECIPES = Path(__file__).parents[1] / "recipes" / "zoo"
# Of batch norms. With torchvision's 0.01 in MobileNetV3, statistics lag behind for 1,000 steps.
MOMENTUM = 0.1
# Of a MobileNetV3's stages those that DeepLab's decoder reads, and the decoder's channels.
DEEPLAB = {"large": (5, 64), "small": (4, 32)}


class Entry(NamedTuple):
    """An architecture."""

    make: Callable[[int], nn.Module]  # number of classes -> the untrained network
    task: str  # a kind of scene_tasks.py
    source: str  # package
    licence: str  # of the code that defines it
    paper: str
    about: str  # what matters for compressing it
    recipe: str = "classifier"  # recipes/zoo/RECIPE.yaml trains it
    small: str = ""  # recipes/zoo/SMALL.small.yaml compresses it; "": RECIPE.small.yaml


def torchvision(name: str) -> Callable[[int], nn.Module]:
    return lambda classes: torchvision_model(name, num_classes=classes)


def timm(name: str) -> Callable[[int], nn.Module]:
    return lambda classes: timm_model(name, num_classes=classes)


def deeplab(classes: int, size: str = "large") -> nn.Module:
    """DeepLabV3+ on a MobileNetV3: features of stride 8, atrous pyramid, a skip of stride 4. Images of 96
    pixels have 12 x 12 features then: with stride 16 and a depthwise pyramid it learns much less."""
    try:
        from segmentation_models_pytorch import DeepLabV3Plus
    except ImportError:
        raise need("segmentation-models-pytorch", "zoo", "zoo:deeplab_v3plus") from None
    depth, channels = DEEPLAB[size]
    net: Any = DeepLabV3Plus(
        f"tu-mobilenetv3_{size}_100", encoder_weights=None, encoder_depth=4, encoder_output_stride=8,
        classes=classes, decoder_channels=channels, decoder_atrous_rates=(2, 3, 4),
        decoder_aspp_separable=False, decoder_aspp_dropout=0,
    )  # fmt: skip
    # timm keeps the stages behind stride 16, which give nothing here and would run.
    net.encoder.model.blocks = net.encoder.model.blocks[:depth]
    found: nn.Module = net
    return found


ZOO: dict[str, Entry] = {
    "squeezenet": Entry(
        torchvision("squeezenet1_1"), "labels", "torchvision", "BSD-3", "Iandola 2016",
        "few parameters, no batch norms", "unnormalized",
    ),
    "mobilenet_v2": Entry(
        torchvision("mobilenet_v2"), "labels", "torchvision", "BSD-3", "Sandler 2018",
        "only ReLU6 and no squeeze-and-excitation: all of it can be int8",
    ),
    "mobilenet_v3_small": Entry(
        torchvision("mobilenet_v3_small"), "labels", "torchvision", "BSD-3", "Howard 2019",
        "the fewest MACs; hard swish and squeeze-and-excitation stay in float",
    ),
    "shufflenet_v2": Entry(
        torchvision("shufflenet_v2_x1_0"), "labels", "torchvision", "BSD-3", "Ma 2018",
        "few MACs; channels are shuffled, so they are cut in groups",
    ),
    "efficientnet_lite0": Entry(
        timm("tf_efficientnet_lite0"), "labels", "timm", "Apache-2.0", "Tan 2019; Lite: Liu 2020",
        "only ReLU6 and no squeeze-and-excitation: all of it can be int8",
    ),
    "resnet18": Entry(
        torchvision("resnet18"), "labels", "torchvision", "BSD-3", "He 2016",
        "wide plain convolutions: the most to prune", "wide",
    ),
    "yolo_lite": Entry(
        YoloLite, "boxes", "tersor", "Apache-2.0", "after Redmon 2016, Tian 2019, Liu 2018",
        "detection without anchors, whole convolutions; decoding is outside the network", "detector",
    ),
    "yolo_lite_mobilenet": Entry(
        lambda classes: YoloLite(classes, "mobilenet"), "boxes", "tersor", "Apache-2.0",
        "after Redmon 2016, Tian 2019, Liu 2018", "the same on MobileNetV3-small",
        "detector",
    ),
    "ssdlite": Entry(
        SsdLite, "anchors", "torchvision", "BSD-3", "Liu 2016; Sandler 2018; Howard 2019",
        "detection with anchors, on MobileNetV3-large; decoding is outside the network",
        "detector", "anchors",
    ),
    "deeplab_v3plus": Entry(
        deeplab, "masks", "segmentation-models-pytorch", "MIT", "Chen 2018; Howard 2019",
        "segmentation: MobileNetV3-large with an atrous pyramid", "segmenter",
    ),
    "deeplab_v3plus_small": Entry(
        lambda classes: deeplab(classes, "small"), "masks", "segmentation-models-pytorch", "MIT",
        "Chen 2018; Howard 2019", "the same on MobileNetV3-small, with half the decoder's channels",
        "segmenter",
    ),
}  # fmt: skip


def entry(name: str) -> Entry:
    if name not in ZOO:
        raise SettingError(f"zoo: it has no {name!r}; {did_you_mean(name, ZOO)}. All: tersor zoo")
    return ZOO[name]


def zoo_recipe(text: str) -> Path:
    """The recipe of the words zoo:NAME or zoo:NAME:small. SettingError for others."""
    _, _, rest = text.partition(":")
    name, _, which = rest.partition(":")
    found = entry(name)
    if which not in {"", "small"}:
        raise SettingError(
            f"zoo: there is no recipe {text}: zoo:{name} trains the network, zoo:{name}:small compresses it"
        )
    return RECIPES / (f"{found.small or found.recipe}.small.yaml" if which else f"{found.recipe}.yaml")


def zoo_model(name: str, seed: int = 0) -> nn.Module:
    """The untrained network of this name, for its task on scenes: each time the same weights, so that a run
    can be resumed and repeated. SettingError, or MissingError."""
    found = entry(name)
    with seeded(seed):
        net = found.make(len(CLASSES) + (found.task == "masks"))
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = MOMENTUM
    return net
