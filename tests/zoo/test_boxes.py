"""Boxes: cells, their targets and decoding against slow loops; loss and average precision."""

import math
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from tersor.errors import TaskError
from tersor.zoo import boxes
from tersor.zoo.boxes import RADIUS, assigned, average_precision, cells, decoded, detection_loss, detections

ops = pytest.importorskip("torchvision").ops

BOXES = torch.tensor([[[10.0, 12, 40, 50], [30, 30, 60, 70], [0, 0, 0, 0]], [[5, 5, 9, 9], [0] * 4, [0] * 4]])
CLASSES = torch.tensor([[2, 0, -1], [1, -1, -1]])


def test_cells_lie_in_rows_of_each_level() -> None:
    at = cells(32, 48)
    assert at[:2].tolist() == [[4, 4, 8], [12, 4, 8]]
    assert at[6].tolist() == [4, 12, 8]
    assert at[24].tolist() == [8, 8, 16]
    assert len(at) == 24 + 6


def test_assignment_is_that_of_a_slow_loop() -> None:
    at = cells(96, 96)
    found = assigned(BOXES, CLASSES, at)
    for image in range(2):
        for cell, (x, y, stride) in enumerate(at.tolist()):
            best, smallest = -1, float("inf")
            for box, (left, top, right, bottom) in enumerate(BOXES[image].tolist()):
                if CLASSES[image, box] < 0 or not (left < x < right and top < y < bottom):
                    continue
                if max(abs(x - (left + right) / 2), abs(y - (top + bottom) / 2)) >= RADIUS * stride:
                    continue
                area = (right - left) * (bottom - top)
                if area < smallest:
                    best, smallest = box, area
            assert found[image, cell] == best
    assert set(found[0].tolist()) == {-1, 0, 1}


def exact(at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs of a detector that sees each box exactly."""
    which = assigned(BOXES, CLASSES, at)
    distances, logits = torch.zeros(2, len(at), 4), torch.full((2, len(at), 3), -20.0)
    for image, cell in (which >= 0).nonzero().tolist():
        left, top, right, bottom = BOXES[image, which[image, cell]]
        x, y, stride = at[cell]
        far = torch.stack([x - left, y - top, right - x, bottom - y]) / stride
        distances[image, cell] = far + torch.log(-torch.expm1(-far))  # the inverse of softplus
        logits[image, cell, CLASSES[image, which[image, cell]]] = 20
    return distances, logits


def test_an_exact_detector_has_no_loss_and_full_precision() -> None:
    at = cells(96, 96)
    output = exact(at)
    loss = detection_loss(at, output, (BOXES, CLASSES))
    assert loss < 1e-4
    seen = detections(at, output)
    assert [len(item["boxes"]) for item in seen] == [2, 1]
    order = seen[0]["labels"].argsort(descending=True)
    assert torch.allclose(seen[0]["boxes"][order], BOXES[0, :2], atol=1e-3)
    worse = (output[0] + 0.5, output[1])
    assert detection_loss(at, worse, (BOXES, CLASSES)) > 0.1
    for figure in ("AP50", "mAP"):
        metric = average_precision(partial(detections, at), figure)
        right = metric.of(metric.statistics(output, (BOXES, CLASSES)))
        assert right == pytest.approx(1)
    blind = (output[0], torch.full_like(output[1], -20.0))
    assert metric.of(metric.statistics(blind, (BOXES, CLASSES))) == 0


def test_the_loss_has_a_gradient_and_takes_images_without_boxes() -> None:
    at, nothing = cells(32, 32), torch.full((2, 3), -1)
    distances = torch.randn(2, len(at), 4, requires_grad=True)
    logits = torch.randn(2, len(at), 5, requires_grad=True)
    loss = detection_loss(at, (distances, logits), (torch.zeros(2, 3, 4), nothing))
    wanted = 0.75 * (logits.sigmoid() ** 2 * F.softplus(logits)).sum()
    assert torch.allclose(loss, wanted)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.abs().sum() > 0


def test_the_loss_is_that_of_a_slow_loop() -> None:
    at = cells(64, 64)
    random = torch.Generator().manual_seed(4)
    distances, logits = (torch.randn(2, len(at), n, generator=random) for n in (4, 3))
    which, found = assigned(BOXES, CLASSES, at), decoded(distances, at)
    total, count = 0.0, 0
    for image in range(2):
        for cell in range(len(at)):
            box, targets = int(which[image, cell]), [0.0, 0.0, 0.0]
            if box >= 0:
                pair = found[image, cell][None], BOXES[image, box][None]
                total += boxes.BOX * (1 - float(ops.generalized_box_iou(*pair)))
                row = logits[image, cell].double()
                total += float(row.exp().sum().log() - row[CLASSES[image, box]])
                targets[CLASSES[image, box]] = max(0.1, float(ops.box_iou(*pair)))
                count += 1
            for target, logit in zip(targets, logits[image, cell].double(), strict=True):
                score = 1 / (1 + float(torch.exp(-logit)))
                entropy = -target * math.log(score) - (1 - target) * math.log(1 - score)
                total += entropy * (target or 0.75 * score**2)
    assert count > 5
    assert float(detection_loss(at, (distances, logits), (BOXES, CLASSES))) == pytest.approx(total / count)


def test_decoding_is_the_definition() -> None:
    at = torch.tensor([[4.0, 12.0, 8.0]])
    far = F.softplus(torch.tensor([0.0, 1.0, 2.0, 3.0])) * 8
    found = decoded(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), at)[0]
    assert torch.allclose(found, torch.stack([4 - far[0], 12 - far[1], 4 + far[2], 12 + far[3]]))


def test_wrong_shapes_and_classes_are_named() -> None:
    at = cells(32, 32)
    output = (torch.zeros(2, len(at), 4), torch.zeros(2, len(at), 2))
    with pytest.raises(TaskError, match="a class is 2, but the detector has 2: 0 to 1"):
        detection_loss(at, output, (BOXES, CLASSES))
    with pytest.raises(TaskError, match="for 20 cells"):
        detection_loss(at, (output[0][:, :3], output[1][:, :3]), (BOXES, CLASSES))
    with pytest.raises(TaskError, match=r"boxes \[1, 3, 4\]"):
        detection_loss(at, output, (BOXES[:1], CLASSES))
