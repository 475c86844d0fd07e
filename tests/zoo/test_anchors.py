"""Anchors: matching, coding and loss of a detector with anchors, against torchvision's SSD."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.errors import TaskError
from tersor.zoo.anchors import PER_CELL, anchors, decoded, encoded, hardest, matched, multibox_loss, seen
from tersor.zoo.boxes import average_precision

ops = pytest.importorskip("torchvision").ops
from torchvision.models.detection._utils import BoxCoder, SSDMatcher  # noqa: E402
from torchvision.models.detection.ssd import SSD  # noqa: E402


def drawn(seed: int, images: int = 3) -> tuple[Tensor, Tensor]:
    """Random boxes [B, 3, 4] and classes [B, 3]; the first image has none."""
    random = torch.Generator().manual_seed(seed)
    corner = torch.rand(images, 3, 2, generator=random) * 60
    boxes = torch.cat([corner, corner + 8 + torch.rand(images, 3, 2, generator=random) * 50], 2)
    classes = torch.randint(-1, 4, (images, 3), generator=random)
    classes[0] = -1
    return boxes, classes


def test_anchors_lie_cell_by_cell() -> None:
    at = anchors(96, 64)
    assert len(at) == PER_CELL * (12 * 8 + 6 * 4 + 3 * 2)
    middle, size = (at[:, :2] + at[:, 2:]) / 2, at[:, 2:] - at[:, :2]
    assert torch.allclose(middle[0], torch.tensor([4.0, 4.0]))
    assert torch.allclose(middle[PER_CELL], torch.tensor([12.0, 4.0])), "the next cell of the row"
    assert torch.allclose(middle[8 * PER_CELL], torch.tensor([4.0, 12.0])), "the next row"
    assert torch.allclose(middle[-1], torch.tensor([48.0, 80.0]))
    assert torch.allclose(size[0], torch.tensor([0.25 * 64, 0.25 * 96]))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_matching_and_coding_are_torchvisions(seed: int) -> None:
    (boxes, classes), at = drawn(seed), anchors(96, 96)
    found = matched(boxes, classes, at)
    assert (found[0] == -1).all()
    for row in range(1, len(boxes)):
        real = (classes[row] >= 0).nonzero()[:, 0]
        if not len(real):
            assert (found[row] == -1).all()
            continue
        theirs = SSDMatcher(0.5)(ops.box_iou(boxes[row, real], at))
        wanted = torch.where(theirs >= 0, real[theirs.clamp(min=0)], -1)
        assert torch.equal(found[row], wanted)
    coder, box = BoxCoder((10.0, 10.0, 5.0, 5.0)), boxes[1, :1].expand(len(at), 4)
    offsets = encoded(box, at)
    assert torch.allclose(offsets, coder.encode_single(box, at), rtol=1e-4, atol=1e-4)
    assert torch.allclose(decoded(offsets, at), box, atol=1e-3)
    wild = torch.randn(len(at), 4, generator=torch.Generator().manual_seed(seed)) * 10
    assert torch.allclose(decoded(wild, at), coder.decode_single(wild, at), rtol=1e-4, atol=1e-2)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_the_loss_is_that_of_torchvisions_ssd(seed: int) -> None:
    (boxes, classes), at = drawn(seed), anchors(32, 64)
    boxes = boxes / torch.tensor([96 / 64, 3.0, 96 / 64, 3.0])
    random = torch.Generator().manual_seed(seed + 1)
    offsets = torch.randn(len(boxes), len(at), 4, generator=random)
    logits = torch.randn(len(boxes), len(at), 5, generator=random)
    given_to_ssd = [
        {"boxes": b[k >= 0].reshape(-1, 4), "labels": k[k >= 0] + 1}
        for b, k in zip(boxes, classes, strict=True)
    ]
    matches = [
        SSDMatcher(0.5)(ops.box_iou(item["boxes"], at)) if len(item["boxes"]) else torch.full((len(at),), -1)
        for item in given_to_ssd
    ]
    part = SimpleNamespace(box_coder=BoxCoder((10.0, 10.0, 5.0, 5.0)), neg_to_pos_ratio=3)
    outputs = {"bbox_regression": offsets, "cls_logits": logits}
    wanted = SSD.compute_loss(part, given_to_ssd, outputs, [at] * len(boxes), matches)
    found = multibox_loss(at, (offsets, logits), (boxes, classes))
    assert torch.allclose(found, wanted["bbox_regression"] + wanted["classification"], rtol=1e-4)


def test_the_hardest_of_the_background_count() -> None:
    losses = torch.tensor([[5.0, 9, 1, 7, 3, 8, 2, 6], [1, 2, 3, 4, 5, 6, 7, 8]])
    positive = torch.zeros(2, 8, dtype=torch.bool)
    positive[0, 1] = True
    assert hardest(losses, positive).nonzero().tolist() == [[0, 3], [0, 5], [0, 7]]


def test_an_exact_detector_has_full_precision_and_little_loss() -> None:
    at = anchors(96, 96)
    boxes = torch.tensor([[[10.0, 12, 40, 50], [30, 50, 60, 80], [0, 0, 0, 0]]])
    classes = torch.tensor([[2, 0, -1]])
    which = matched(boxes, classes, at)[0]
    logits = torch.zeros(1, len(at), 4)
    logits[0, :, 0] = 20
    offsets = torch.zeros(1, len(at), 4)
    for anchor in (which >= 0).nonzero()[:, 0].tolist():
        offsets[0, anchor] = encoded(boxes[0, which[anchor]], at[anchor])
        logits[0, anchor, 0], logits[0, anchor, classes[0, which[anchor]] + 1] = 0, 20
    output = (offsets, logits)
    assert multibox_loss(at, output, (boxes, classes)) < 1e-4
    found = seen(at, output)[0]
    assert sorted(found["labels"].tolist()) == [0, 2]
    metric = average_precision(partial(seen, at), "mAP")
    assert metric.of(metric.statistics(output, (boxes, classes))) == pytest.approx(1)
    assert multibox_loss(at, (offsets + 1, logits), (boxes, classes)) > 0.5


def test_wrong_shapes_are_named() -> None:
    at, (boxes, classes) = anchors(32, 32), drawn(1)
    output = (torch.zeros(3, len(at), 4), torch.zeros(3, len(at), 4))
    with pytest.raises(TaskError, match="a class is 3, but the detector has 3: 0 to 2"):
        multibox_loss(at, output, (boxes, torch.full_like(classes, 3)))
    with pytest.raises(TaskError, match=f"for {len(at)} anchors"):
        multibox_loss(at, (output[0][:, :3], output[1][:, :3]), (boxes, classes))
