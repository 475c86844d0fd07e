"""YOLO-lite: a small anchor-free detector: ShuffleNetV2 or MobileNetV3, path aggregation, one head.

image -> features of stride 8, 16 -> top-down, bottom-up (Liu et al. 2018) -> 4 + K numbers for each cell
Each cell gives the distances from its center to a box's four sides, in strides, and a score for each class,
as in FCOS (Tian et al. 2019). Decoding and non-maximum suppression are outside the network (boxes.py), so it
exports, and students can be compared with teachers. At 96 x 96: 0.3 million parameters, 21 million MACs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import SettingError, did_you_mean, need

STRIDES = (8, 16)
WIDTH = 64  # channels of the neck and the head
PRIOR = 0.01  # score of every class at the start, so that the many empty cells do not rule the loss
# backbone -> the parts whose outputs have stride 8 and 16, and their channels
BACKBONES = {"shufflenet": (116, 232), "mobilenet": (24, 48)}


class Conv(nn.Sequential):
    """A convolution, batch norm and ReLU; depthwise and pointwise if `size` is more than 1."""

    def __init__(self, ins: int, outs: int, size: int = 1, stride: int = 1):
        deep = [
            nn.Conv2d(ins, ins, size, stride, size // 2, groups=ins, bias=False),
            nn.BatchNorm2d(ins),
            nn.ReLU(inplace=True),
        ]
        wide = [nn.Conv2d(ins, outs, 1, bias=False), nn.BatchNorm2d(outs), nn.ReLU(inplace=True)]
        super().__init__(*(deep if size > 1 else []), *wide)


class YoloLite(nn.Module):
    """[B, 3, H, W] -> boxes [B, N, 4] in strides, classes [B, N, K] as logits; N cells of both strides.

    H and W are multiples of 16. `cells(H, W)` of boxes.py gives the cells' centers and strides.
    """

    def __init__(self, classes: int = 10, backbone: str = "shufflenet", width: int = WIDTH):
        super().__init__()
        if backbone not in BACKBONES:
            raise SettingError(f"yolo_lite: backbone={backbone!r}; {did_you_mean(backbone, BACKBONES)}")
        self.fine, self.coarse = features(backbone)
        low, high = BACKBONES[backbone]
        self.lateral_fine, self.lateral_coarse = Conv(low, width), Conv(high, width)
        self.down_fine, self.up_coarse = Conv(width, width, 5), Conv(width, width, 5)
        self.reduce = Conv(width, width, 3, 2)
        self.head = nn.Sequential(Conv(width, width, 5), Conv(width, width, 5))
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
    """torchvision's layers up to stride 8, and those from there to stride 16, untrained."""
    try:
        from torchvision import models
    except ImportError:
        raise need("torchvision", "zoo", "yolo_lite") from None
    if backbone == "shufflenet":
        net: Any = models.shufflenet_v2_x1_0(weights=None)
        return nn.Sequential(net.conv1, net.maxpool, net.stage2), net.stage3
    layers = models.mobilenet_v3_small(weights=None).features
    return layers[:4], layers[4:9]
