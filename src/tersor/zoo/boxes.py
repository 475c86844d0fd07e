"""Boxes: what surrounds an anchor-free detector: the cells' targets, its loss, and decoding.

loss = varifocal loss of the classes + cross entropy of the classes + BOX * (1 - GIoU), per assigned cell
varifocal       the target of an assigned cell's class is the IoU of its box, and so is its weight; the others
                weigh the less, the surer they are that nothing is there (Zhang et al. 2021)
cross entropy   of assigned cells only: in the varifocal loss a wrong class of low score weighs almost
                nothing, so classes that look alike stay alike
GIoU            Rezatofighi et al. 2019
A cell is assigned to the smallest box whose middle is near it, within RADIUS strides, on every level, as in
FCOS (Tian et al. 2019).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tersor.errors import TaskError, need
from tersor.model.metric import Metric
from tersor.zoo.precision import THRESHOLDS, image_matches, mean_precision
from tersor.zoo.scenes import BORDER
from tersor.zoo.yolo_lite import STRIDES

RADIUS = 1.0  # strides
BOX = 2.5  # weight of the boxes in the loss
ALPHA, GAMMA = 0.75, 2.0  # of the varifocal loss, for what is not there: weight, and its power
LEAST = 0.1  # target of an assigned cell's class, however bad its box is yet
SCORE, OVERLAP, MOST = 0.05, 0.45, 100  # detections kept: least score, largest IoU of two, number
RESAMPLES = 100  # of the bootstrap: each ranks all detections again
FIGURES = {"AP50": 1, "mAP": len(THRESHOLDS)}  # figure -> thresholds of the IoU


def cells(height: int, width: int, strides: Sequence[int] = STRIDES) -> Tensor:
    """[N, 3]: x and y of each cell's center in pixels, and its stride. Row by row, level by level."""
    found = []
    for stride in strides:
        y, x = torch.meshgrid(
            (torch.arange(height // stride) + 0.5) * stride,
            (torch.arange(width // stride) + 0.5) * stride,
            indexing="ij",
        )
        found.append(torch.stack([x.flatten(), y.flatten(), torch.full((x.numel(),), float(stride))], 1))
    return torch.cat(found)


def decoded(distances: Tensor, at: Tensor) -> Tensor:
    """Boxes [..., N, 4] in pixels from a detector's distances [..., N, 4] and the cells [N, 3]."""
    far = F.softplus(distances) * at[:, 2:]
    return torch.cat([at[:, :2] - far[..., :2], at[:, :2] + far[..., 2:]], -1)


def assigned(boxes: Tensor, classes: Tensor, at: Tensor) -> Tensor:
    """[B, N]: the index of the box of each cell, -1 for none. `boxes` [B, G, 4], `classes` [B, G]."""
    x, y, stride = at.to(boxes).unbind(1)
    middle = (boxes[..., :2] + boxes[..., 2:]) / 2  # [B, G, 2]
    near = (x - middle[..., :1]).abs().maximum((y - middle[..., 1:]).abs()) < RADIUS * stride  # [B, G, N]
    inside = (x > boxes[..., :1]) & (y > boxes[..., 1:2]) & (x < boxes[..., 2:3]) & (y < boxes[..., 3:])
    area = ((boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1]))[..., None]  # [B, G, 1]
    fits = near & inside & (classes != BORDER)[..., None]
    smallest, which = torch.where(fits, area, torch.inf).min(1)
    return torch.where(smallest.isfinite(), which, -1)


def detection_loss(at: Tensor, output: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> Tensor:
    """The loss of a batch. `output`: distances [B, N, 4], logits [B, N, K]; `target`: boxes [B, G, 4] in
    pixels, classes [B, G], -1 in rows that pad."""
    ops = torchvision_ops("the loss of a detector")
    (distances, logits), (boxes, classes) = output, target
    check(logits, boxes, classes, at)
    at = at.to(distances)
    which = assigned(boxes, classes, at)
    positive = which >= 0
    sample, cell = positive.nonzero(as_tuple=True)
    chosen = which[sample, cell]
    labels = classes[sample, chosen]
    found, wanted = decoded(distances, at)[sample, cell], boxes[sample, chosen]
    misses = ops.generalized_box_iou_loss(found, wanted, reduction="sum")
    quality = torch.zeros_like(logits)
    overlap = overlaps(found.detach(), wanted).clamp(min=LEAST)
    quality[sample, cell, labels] = overlap.to(quality)
    weight = torch.where(quality > 0, quality, ALPHA * logits.detach().sigmoid() ** GAMMA)
    scores = (F.binary_cross_entropy_with_logits(logits, quality, reduction="none") * weight).sum()
    kinds = F.cross_entropy(logits[sample, cell], labels, reduction="sum")
    return (scores + kinds + BOX * misses) / max(1, len(cell))


def overlaps(first: Tensor, second: Tensor) -> Tensor:
    """[D]: the IoU of each box [D, 4] with the one of the same row."""
    inner = first[:, 2:].minimum(second[:, 2:]) - first[:, :2].maximum(second[:, :2])
    both = inner.clamp(min=0).prod(1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (first, second)]
    return both / (areas[0] + areas[1] - both)


def check(logits: Tensor, boxes: Tensor, classes: Tensor, at: Tensor, what: str = "cells") -> None:
    if logits.ndim != 3 or logits.shape[1] != len(at):
        raise TaskError(f"detector: logits {list(logits.shape)} for {len(at)} {what}; give [B, {len(at)}, K]")
    if boxes.shape != (*classes.shape, 4) or len(boxes) != len(logits):
        raise TaskError(
            f"detector: boxes {list(boxes.shape)} and classes {list(classes.shape)} for {len(logits)} "
            "images; give [B, G, 4] and [B, G]"
        )
    if len(classes) and int(classes.max()) >= logits.shape[2]:
        raise TaskError(
            f"detector: a class is {int(classes.max())}, but the detector has {logits.shape[2]}: "
            f"0 to {logits.shape[2] - 1}"
        )


def detections(at: Tensor, output: tuple[Tensor, Tensor]) -> list[dict[str, Tensor]]:
    """What is seen in each image: "boxes" [D, 4] in pixels, "scores" [D], "labels" [D], best first."""
    return chosen(decoded(output[0], at.to(output[0])), output[1].sigmoid())


def chosen(boxes: Tensor, scores: Tensor) -> list[dict[str, Tensor]]:
    """The detections of each image, best first, from all its boxes [B, N, 4] and their scores [B, N, K]."""
    ops = torchvision_ops("decoding a detector's outputs")
    found = []
    for all_boxes, all_scores in zip(boxes, scores, strict=True):
        cell, label = (all_scores > SCORE).nonzero(as_tuple=True)
        score = all_scores[cell, label]
        kept = ops.batched_nms(all_boxes[cell].float(), score.float(), label, OVERLAP)[:MOST]
        found.append({"boxes": all_boxes[cell[kept]], "scores": score[kept], "labels": label[kept]})
    return found


def average_precision(seen: Callable[[Any], list[dict[str, Tensor]]], figure: str = "AP50") -> Metric:
    """Mean average precision over the classes (precision.py): at an IoU of 0.5, or "mAP": 0.5 to 0.95.

    `seen`: a detector's outputs -> detections of each image."""

    def statistics(output: Any, target: tuple[Tensor, Tensor]) -> list[Any]:
        ops, found = torchvision_ops(f"the metric {figure}"), []
        for item, boxes, classes in zip(seen(output), *target, strict=True):
            real = classes != BORDER
            overlap = ops.box_iou(item["boxes"].double(), boxes[real].double())
            found.append(image_matches(item["scores"], item["labels"], classes[real], overlap))
        return found

    def value(samples: list[Any]) -> float:
        return mean_precision(samples, FIGURES[figure])

    return Metric(figure, statistics=statistics, value=value, percent=True, resamples=RESAMPLES)


def torchvision_ops(why: str) -> Any:
    try:
        from torchvision import ops
    except ImportError:
        raise need("torchvision", "zoo", why) from None
    return ops
