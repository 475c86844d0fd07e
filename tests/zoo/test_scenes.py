"""Scenes: the same everywhere, boxes and masks that say what is in the image."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.errors import TaskError
from tersor.zoo.scene_tasks import mirrored
from tersor.zoo.scenes import CLASSES, SEEN, Kept, Scenes, bounds, shrunk


def garments(count: int = 20) -> tuple[Tensor, Tensor]:
    """Filled ellipses of several widths."""
    y, x = torch.meshgrid(torch.arange(28) - 13.5, torch.arange(28) - 13.5, indexing="ij")
    wide = torch.linspace(5, 13, count)[:, None, None]
    return ((x / wide) ** 2 + (y / 12) ** 2 < 1).to(torch.uint8) * 255, torch.arange(count) % len(CLASSES)


def scenes(count: int = 30, seed: int = 0, **given: object) -> Scenes:
    images, labels = garments()
    photos = [torch.zeros(3, 60, 80, dtype=torch.uint8), torch.zeros(3, 200, 50, dtype=torch.uint8)]
    return Scenes(images, labels, photos, count, seed=seed, **given)  # type: ignore[arg-type]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(8, 120), st.integers(1, 5))
def test_boxes_and_masks_say_what_is_there(seed: int, size: int, most: int) -> None:
    scene = scenes(1, seed, size=size, most=most)[0]
    assert scene.image.shape == (3, size, size)
    assert scene.image.min() >= 0
    assert scene.image.max() <= 1
    assert 1 <= len(scene.classes) <= most
    assert len(scene.boxes) == len(scene.classes)
    assert set(scene.mask.unique().tolist()) - {0} == {int(k) + 1 for k in scene.classes}
    assert torch.equal(scene.mask > 0, scene.image.sum(0) > 0), "the photographs are black"
    left, top, right, bottom = scene.boxes.unbind(1)
    assert (left < right).all()
    assert (top < bottom).all()
    assert scene.boxes.min() >= 0
    assert scene.boxes.max() <= size
    for label in scene.classes.unique():  # of a class that is there once, the box is that of its pixels
        if (scene.classes == label).sum() == 1:
            rows, columns = (scene.mask == label + 1).nonzero().unbind(1)
            slow = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert scene.boxes[scene.classes == label][0].tolist() == [int(k) for k in slow]


def test_a_scene_is_the_same_whoever_asks_and_whatever_was_drawn_before() -> None:
    first = [scenes()[k] for k in (3, 7)]
    torch.manual_seed(5)
    torch.rand(100)
    again = scenes(8)
    for a, b in zip(first, (again[3], again[7]), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(first[0].image, scenes(seed=1)[3].image)
    assert not torch.equal(first[0].image, first[1].image)


def test_kept_scenes_are_the_same_and_composed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, made = Kept(scenes()), []
    compose = Scenes.__getitem__
    monkeypatch.setattr(Scenes, "__getitem__", lambda self, k: made.append(k) or compose(self, k))
    for number in (3, 7, 3, 7, 3):
        for a, b in zip(kept[number], compose(kept.scenes, number), strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
    assert made == [3, 7]
    assert len(kept) == 30


def test_a_mirrored_scene_has_its_boxes_where_its_pixels_are() -> None:
    for number in range(20):
        scene = mirrored(scenes()[number])
        assert torch.equal(scene.image.flip(2), scenes()[number].image)
        for label in scene.classes.unique():
            if (scene.classes == label).sum() == 1:
                assert torch.equal(bounds(scene.mask == label + 1), scene.boxes[scene.classes == label][0])


def test_a_varied_background_shows_both_photographs_and_changes_nothing_else() -> None:
    images, labels = garments()
    photos = [torch.full((3, 50, 50), shade, dtype=torch.uint8) for shade in (0, 102)]
    plain = Scenes(images, labels, photos, 40, size=48)
    varied = Scenes(images, labels, photos, 40, size=48, varied=True)
    shades = set()
    for number in range(40):
        scene = varied[number]
        behind = scene.image[:, scene.mask == 0]
        assert behind.min() >= 0
        assert behind.max() <= 1
        shades |= set((behind[0].unique() * 255).round().int().tolist())
        assert torch.equal(scene.image, varied[number].image)
        assert plain[number].image[:, plain[number].mask == 0].unique().numel() == 1
    assert {0, 102, 153, 255} <= shades, "both photographs, inverted too"
    assert len(shades) > 20, "and one faintly over the other"


def test_a_garment_in_front_leaves_enough_of_the_others() -> None:
    """One garment alone against the same one with others: half of its pixels stay."""
    images, labels = garments(1)
    photo = [torch.zeros(3, 40, 40, dtype=torch.uint8)]
    many = Scenes(images, labels, photo, 200, most=4, size=48, sides=(0.5, 0.5))
    for number in range(200):
        scene = many[number]
        alone = 24 * 24 * torch.pi / 4 * (10 / 28) * (24 / 28)  # an ellipse of these half axes, in pixels
        assert int((scene.mask > 0).sum()) >= SEEN * alone * 0.8


def test_outlines_of_single_pixels_and_shrunk_photographs() -> None:
    inside = torch.zeros(5, 5, dtype=torch.bool)
    inside[3, 1] = True
    assert bounds(inside).tolist() == [1, 3, 2, 4]
    photo = torch.full((3, 1000, 500), 77, dtype=torch.uint8)
    assert shrunk(photo).shape == (3, 480, 240)
    assert (shrunk(photo) == 77).all()
    small = torch.zeros(3, 10, 20, dtype=torch.uint8)
    assert shrunk(small) is small


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda i, t: (i, t[:-1], 1), "19 labels for 20 garments"),
        (lambda i, t: (i, t + 1, 1), "a label is 10, but the classes are 0 to 9"),
        (lambda i, t: (i, t, 0), "count=0"),
    ],
)
def test_wrong_data_is_named(
    change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, int]], says: str
) -> None:
    images, labels, count = change(*garments())
    with pytest.raises(TaskError, match=says):
        Scenes(images, labels, [torch.zeros(3, 9, 9, dtype=torch.uint8)], count)
    with pytest.raises(TaskError, match="no photograph"):
        Scenes(*garments(), [], 1)
