"""Anchors: what surrounds a detector with anchors (SSD): the anchors' targets, its loss, and decoding.

loss = (cross entropy of the classes + smooth L1 of the boxes' offsets) per matched anchor     Liu et al. 2016
An anchor is matched to the box it overlaps most, if that is at least half, and each box to its best anchor.
The other anchors are background; of those only the 3 for each match that are wrong most count.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from tersor.errors import need
from tersor.zoo.boxes import check, chosen, torchvision_ops
from tersor.zoo.scenes import BORDER

STRIDES = (8, 16, 32)
SCALES = [0.25, 0.36, 0.46, 0.6]  # of anchors, shares of the side; the last ends the third map
RATIOS = [2, 3]  # of the longer side to the shorter one
PER_CELL = 2 + 2 * len(RATIOS)
MATCHED = 0.5  # least IoU of an anchor with its box
NEGATIVES = 3  # anchors of the background that count, for each matched one
# Offsets are divided by these (Liu's "variances"), so that they are of the size of 1.
SPREAD = (0.1, 0.1, 0.2, 0.2)
FAR = math.log(1000 / 16)  # of a side's logarithm: exp() of more would be no box


@lru_cache(maxsize=8)
def anchors(height: int, width: int) -> Tensor:
    """[N, 4]: left, top, right, bottom of each anchor in pixels, cell by cell, level by level, as the network
    gives its outputs. MissingError without torchvision."""
    try:
        from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
        from torchvision.models.detection.image_list import ImageList
    except ImportError:
        raise need("torchvision", "zoo", "the anchors of a detector") from None
    make = DefaultBoxGenerator([RATIOS] * len(STRIDES), scales=SCALES, steps=list(STRIDES))
    image = ImageList(torch.zeros(1, 3, height, width), [(height, width)])
    maps = [torch.zeros(1, 1, height // stride, width // stride) for stride in STRIDES]
    found: Tensor = make(image, maps)[0]
    return found


def middles(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Middles and sizes, [..., 2] each, of boxes [..., 4]."""
    return (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]


def encoded(boxes: Tensor, at: Tensor) -> Tensor:
    """The offsets [..., 4] that decode to these boxes [..., 4] from anchors [..., 4]."""
    (middle, size), (start, unit) = middles(boxes), middles(at)
    return torch.cat([(middle - start) / unit, (size / unit).log()], -1) / boxes.new_tensor(SPREAD)


def decoded(offsets: Tensor, at: Tensor) -> Tensor:
    """Boxes [..., N, 4] in pixels from a detector's offsets [..., N, 4] and the anchors [N, 4]."""
    start, unit = middles(at)
    moved = offsets * offsets.new_tensor(SPREAD)
    middle, size = start + moved[..., :2] * unit, moved[..., 2:].clamp(max=FAR).exp() * unit
    return torch.cat([middle - size / 2, middle + size / 2], -1)


def matched(boxes: Tensor, classes: Tensor, at: Tensor) -> Tensor:
    """[B, N]: the index of the box of each anchor, -1 for none. `boxes` [B, G, 4], `classes` [B, G]."""
    ops = torchvision_ops("the loss of a detector")
    found = torch.full((len(boxes), len(at)), -1, device=boxes.device)
    for row, real in enumerate(classes != BORDER):
        numbers = real.nonzero()[:, 0]
        if len(numbers):
            overlap = ops.box_iou(boxes[row, numbers], at)  # [G, N]
            most, which = overlap.max(0)
            found[row] = torch.where(most >= MATCHED, numbers[which], -1)
            found[row, overlap.argmax(1)] = numbers
    return found


def multibox_loss(at: Tensor, output: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> Tensor:
    """The loss of a batch. `output`: offsets [B, N, 4], logits [B, N, 1 + K]; `target`: boxes [B, G, 4] in
    pixels, classes [B, G], -1 in rows that pad."""
    (offsets, logits), (boxes, classes) = output, target
    check(logits[..., 1:], boxes, classes, at, "anchors")
    at = at.to(offsets)
    which = matched(boxes, classes, at)
    positive = which >= 0
    sample, anchor = positive.nonzero(as_tuple=True)
    box = which[sample, anchor]
    wanted = encoded(boxes[sample, box].to(offsets), at[anchor])
    misses = F.smooth_l1_loss(offsets[sample, anchor], wanted, reduction="sum")
    labels = torch.zeros_like(which)
    labels[sample, anchor] = classes[sample, box] + 1
    each = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")  # [B, N]
    return (misses + each[positive | hardest(each.detach(), positive)].sum()) / max(1, len(box))


def hardest(losses: Tensor, positive: Tensor) -> Tensor:
    """[B, N] bool: of an image, NEGATIVES anchors for each positive one, of the largest losses [B, N]."""
    ranks = losses.masked_fill(positive, -torch.inf).argsort(1, descending=True).argsort(1)
    return (ranks < NEGATIVES * positive.sum(1, keepdim=True)) & ~positive


def seen(at: Tensor, output: tuple[Tensor, Tensor]) -> list[dict[str, Tensor]]:
    """What is seen in each image: "boxes" [D, 4] in pixels, "scores" [D], "labels" [D], best first."""
    offsets, logits = output
    return chosen(decoded(offsets, at.to(offsets)), logits.softmax(2)[..., 1:])
