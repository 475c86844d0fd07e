"""YOLO-lite: a small anchor-free detector: residual blocks or MobileNetV3, path aggregation, one head.

image -> features of stride 8, 16 -> top-down, bottom-up (Liu et al. 2018) -> 4 + K numbers for each cell
Each cell gives the distances from its center to a box's four sides, in strides, and a score for each class,
as in FCOS (Tian et al. 2019). Decoding and non-maximum suppression are outside the network (boxes.py), so it
exports, and students can be compared with teachers. At 96 x 96: 1.1 million parameters, 84 million MACs.
Convolutions of the neck and the head are whole: at equal time they find more than depthwise ones of 5 x 5,
and integer kernels gain more on them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import SettingError, did_you_mean, need

STRIDES = (8, 16)
WIDTH = 64  # channels of the neck and the head
PRIOR = 0.01  # score of every class at the start, so that the many empty cells do not rule the loss
# backbone -> channels of its features of stride 8 and 16
BACKBONES = {"residual": (64, 128), "mobilenet": (24, 48)}


class Conv(nn.Sequential):
    """A convolution, batch norm and ReLU."""

    def __init__(self, ins: int, outs: int, size: int = 3, stride: int = 1):
        super().__init__(
            nn.Conv2d(ins, outs, size, stride, size // 2, bias=False),
            nn.BatchNorm2d(outs),
            nn.ReLU(inplace=True),
        )


class Residual(nn.Module):
    """x + two convolutions of it (He et al. 2016)."""

    def __init__(self, width: int):
        super().__init__()
        self.first, self.second = Conv(width, width), nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm(self.second(self.first(x))))


class YoloLite(nn.Module):
    """[B, 3, H, W] -> boxes [B, N, 4] in strides, classes [B, N, K] as logits; N cells of both strides.

    H and W are multiples of 16. `cells(H, W)` of boxes.py gives the cells' centers and strides.
    """

    def __init__(self, classes: int = 10, backbone: str = "residual", width: int = WIDTH):
        super().__init__()
        if backbone not in BACKBONES:
            raise SettingError(f"yolo_lite: backbone={backbone!r}; {did_you_mean(backbone, BACKBONES)}")
        self.fine, self.coarse = features(backbone)
        low, high = BACKBONES[backbone]
        self.lateral_fine, self.lateral_coarse = Conv(low, width, 1), Conv(high, width, 1)
        self.down_fine, self.up_coarse = Conv(width, width), Conv(width, width)
        self.reduce = Conv(width, width, stride=2)
        self.head = nn.Sequential(Conv(width, width), Conv(width, width))
        self.box, self.score = nn.Conv2d(width, 4, 1), nn.Conv2d(width, classes, 1)
        with torch.no_grad():
            for layer, start in ((self.score, -math.log(1 / PRIOR - 1)), (self.box, 1.0)):
                layer.get_parameter("bias").fill_(start)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        fine = self.fine(images)
        coarse = self.coarse(fine)
        fine, coarse = self.lateral_fine(fine), self.lateral_coarse(coarse)
        fine = self.down_fine(fine + F.interpolate(coarse, scale_factor=2.0, mode="nearest"))
        coarse = self.up_coarse(coarse + self.reduce(fine))
        maps = [self.head(level) for level in (fine, coarse)]
        boxes = torch.cat([self.box(level).flatten(2) for level in maps], 2)  # [B, 4, N]
        scores = torch.cat([self.score(level).flatten(2) for level in maps], 2)
        return boxes.transpose(1, 2), scores.transpose(1, 2)


def features(backbone: str) -> tuple[nn.Module, nn.Module]:
    """The layers up to stride 8, and those from there to stride 16, untrained."""
    if backbone == "residual":
        start = [Conv(3, 16, stride=2), Conv(16, 32, stride=2), Residual(32)]
        fine = [*start, Conv(32, 64, stride=2), Residual(64), Residual(64)]
        coarse = [Conv(64, 128, stride=2), Residual(128), Residual(128)]
        return nn.Sequential(*fine), nn.Sequential(*coarse)
    try:
        from torchvision import models
    except ImportError:
        raise need("torchvision", "zoo", "yolo_lite") from None
    layers = models.mobilenet_v3_small(weights=None).features
    return layers[:4], layers[4:9]
