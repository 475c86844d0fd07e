"""Mean average precision: that of torchmetrics (pycocotools), on random detections."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.zoo.precision import RECALLS, THRESHOLDS, image_matches, mean_precision

box_iou = pytest.importorskip("torchvision").ops.box_iou
Detection = pytest.importorskip("torchmetrics.detection").MeanAveragePrecision
pytest.importorskip("pycocotools")


def boxes(count: int, random: torch.Generator) -> Tensor:
    """Whole pixels, few places: many overlaps, whose IoU is the same in every precision."""
    corner = torch.randint(0, 12, (count, 2), generator=random)
    return torch.cat([corner, corner + torch.randint(5, 14, (count, 2), generator=random)], 1).float()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5))
def test_it_is_that_of_torchmetrics(seed: int, classes: int) -> None:
    random = torch.Generator().manual_seed(seed)
    found, wanted = [], []
    for _ in range(6):
        d, g = (int(torch.randint(most, (), generator=random)) for most in (25, 5))
        scores = torch.rand(d, generator=random).sort(descending=True)[0]
        labels = [torch.randint(classes, (n,), generator=random) for n in (d, g)]
        found.append({"boxes": boxes(d, random), "scores": scores, "labels": labels[0]})
        wanted.append({"boxes": boxes(g, random), "labels": labels[1]})
    # COCO's thresholds, which torchmetrics rounds to float32 if they are not given.
    metric = Detection(iou_thresholds=list(THRESHOLDS), rec_thresholds=RECALLS.tolist())
    metric.update(found, wanted)
    theirs = metric.compute()
    images = [
        image_matches(
            a["scores"], a["labels"], b["labels"], box_iou(a["boxes"].double(), b["boxes"].double())
        )
        for a, b in zip(found, wanted, strict=True)
    ]
    for count, figure in ((1, "map_50"), (len(THRESHOLDS), "map")):
        mine = mean_precision(images, count)
        assert mine == pytest.approx(max(0.0, float(theirs[figure])), abs=1e-6)


def test_nothing_seen_and_nothing_there() -> None:
    nothing, label = (torch.zeros(0), torch.zeros(0).long()), torch.tensor([1])
    blind = image_matches(*nothing, label, torch.zeros(0, 1))
    empty = image_matches(*nothing, label[:0], torch.zeros(0, 0))
    assert mean_precision([blind, empty], 1) == 0
    assert mean_precision([empty], 1) == 0
    once = image_matches(torch.tensor([0.2, 0.9]), label.repeat(2), label, torch.ones(2, 1))
    assert once["hits"][:, 0].tolist() == [True, False], "a box is found once, by the surer one"
    assert mean_precision([once], 10) == 1
