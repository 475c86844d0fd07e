"""SSDLite: torchvision's SSDLite on MobileNetV3-large, with maps of stride 8, 16, 32 for small images.

image -> features of stride 8, 16, 32 -> depthwise heads -> 4 + 1 + K numbers for each anchor
Liu et al. 2016; Sandler et al. 2018, section 6.2; Howard et al. 2019, section 6.3
torchvision's own detector begins at stride 16, for images of 320 pixels: at 96 pixels that is a map of 6 x 6
for objects of 24 to 44. Here each stride comes one stage earlier; blocks, head and anchors are torchvision's.
What surrounds the network is in anchors.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from tersor.errors import need
from tersor.zoo.anchors import PER_CELL

FINE, COARSE = 7, 12  # of MobileNetV3-large's stages: the first of stride 16, and the last
EXTRA = 0.25  # width of the map of stride 32, as a share of SSDLite's 512 channels
EPS = 1e-3  # of batch norms, as in MobileNetV3


class SsdLite(nn.Module):
    """[B, 3, H, W] -> boxes [B, N, 4] as offsets from anchors, classes [B, N, 1 + K] as logits, 0 for none.

    H and W are multiples of 32; `anchors(H, W)` of anchors.py gives the N anchors. MissingError without
    torchvision.
    """

    def __init__(self, classes: int = 10):
        super().__init__()
        try:
            from torchvision.models import mobilenet_v3_large
            from torchvision.models.detection.ssdlite import SSDLiteFeatureExtractorMobileNet, SSDLiteHead
        except ImportError:
            raise need("torchvision", "zoo", "zoo:ssdlite") from None
        norm: Any = partial(nn.BatchNorm2d, eps=EPS)
        stages = mobilenet_v3_large(weights=None).features[: COARSE + 1]
        self.backbone = SSDLiteFeatureExtractorMobileNet(stages, FINE, norm, width_mult=EXTRA)
        self.backbone.extra = self.backbone.extra[:1]  # the next maps would have 2 x 2 cells, and 1
        channels = [240, 112, 128]
        self.head = SSDLiteHead(channels, [PER_CELL] * len(channels), classes + 1, norm)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        found = self.head(list(self.backbone(images).values()))
        return found["bbox_regression"], found["cls_logits"]
