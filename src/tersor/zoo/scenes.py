"""Scenes: garments on crops of photographs, with classes, boxes and masks. Endless, and repeatable by seed.

scene = crop of a photograph + 1 to 3 garments, each of a random size, tint and place, the later ones in front
Garments are the images of Fashion-MNIST (Xiao, Rasul, Vollgraf 2017), photographs those that scikit-image
holds. Scene i of a seed is the same on every machine and in every process. Test scenes take other garments
and other photographs than training scenes. `varied` makes many backgrounds of the few photographs, so that a
network learns what is no garment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from tersor.errors import TaskError, need

SIZE = 96  # pixels of a side
GARMENTS = 3  # at most, in a scene
SIDES = (0.25, 0.46)  # of a garment, as a share of the scene's side
SHORTER = 240  # pixels of a photograph's shorter side
CROPS = (0.4, 1.0)  # of a photograph, as a share of its shorter side
FAINT = 0.5  # at most, of a varied background's second photograph around its ellipse
INK = 0.1  # a pixel of a garment brighter than this is part of it
TINTS = (0.35, 1.0)  # a garment's color: the factor of each channel
SEEN = 0.5  # of a garment must stay in view: less, and another place is tried
TRIES = 10
BORDER = -1  # class of the rows that pad the boxes of a scene
CLASSES = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
PHOTOS = {
    "train": (
        "astronaut", "brick", "camera", "cell", "clock", "coffee", "colorwheel", "grass",
        "immunohistochemistry", "moon", "page", "text",
    ),
    "test": ("chelsea", "coins", "gravel", "hubble_deep_field", "retina", "rocket"),
}  # fmt: skip


class Scene(NamedTuple):
    """A scene of S x S pixels with G garments."""

    image: Tensor  # [3, S, S] float32, whole 255ths of 0..1
    boxes: Tensor  # [G, 4] float32: left, top, right, bottom, in pixels
    classes: Tensor  # [G] int64, 0..9
    mask: Tensor  # [S, S] int64: 0 is the background, k + 1 a garment of class k


class Scenes(Dataset[Scene]):
    """`count` scenes of one seed."""

    def __init__(
        self, garments: Tensor, labels: Tensor, photos: Sequence[Tensor], count: int, *, seed: int = 0,
        size: int = SIZE, most: int = GARMENTS, sides: tuple[float, float] = SIDES, varied: bool = False,
    ):  # fmt: skip
        """`garments` [N, 28, 28] uint8, `labels` [N] in 0..9, `photos` [3, H, W] uint8 each; 1 to `most`
        garments a scene, whose `sides` are shares of the scene's. `varied`: backgrounds are made of two
        photographs."""
        if len(garments) != len(labels) or not len(garments):
            raise TaskError(f"scenes: {len(labels)} labels for {len(garments)} garments; give one for each")
        if not photos:
            raise TaskError("scenes: no photograph is given; give [3, H, W] uint8 tensors")
        outside = labels[(labels < 0) | (labels >= len(CLASSES))]
        if len(outside):
            raise TaskError(
                f"scenes: a label is {int(outside[0])}, but the classes are 0 to {len(CLASSES) - 1}"
            )
        for word, value in (("count", count), ("size", size), ("most", most)):
            if value < 1:
                raise TaskError(f"scenes: {word}={value}, but it is 1 or more")
        self.garments, self.labels, self.photos = garments, labels, tuple(photos)
        self.count, self.seed, self.size, self.most, self.sides = count, seed, size, most, sides
        self.varied = varied

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Scene:
        if not 0 <= index < self.count:
            raise IndexError(index)
        drawn = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        image = self.two(drawn) if self.varied else self.background(drawn)
        owner = torch.full((self.size, self.size), -1)  # [S, S]: the garment of each pixel
        classes: list[int] = []
        wanted = 1 + int(torch.randint(self.most, (), generator=drawn))
        for _ in range(wanted):
            which = int(torch.randint(len(self.garments), (), generator=drawn))
            placed = self.place(self.garments[which], owner, len(classes), drawn)
            if placed is None:
                continue
            shade, ink, top, left = placed
            rows, columns = slice(top, top + len(ink)), slice(left, left + len(ink))
            low, high = TINTS
            tint = low + (high - low) * torch.rand(3, 1, 1, generator=drawn)
            image[:, rows, columns] = torch.where(ink, shade * tint, image[:, rows, columns])
            owner[rows, columns] = torch.where(ink, len(classes), owner[rows, columns])
            classes.append(int(self.labels[which]))
        image = image.mul_(255).round_().div_(255)
        found = torch.tensor(classes)
        boxes = torch.stack([bounds(owner == number) for number in range(len(classes))])
        mask = torch.cat([torch.zeros(1, dtype=torch.int64), found + 1])[owner + 1]
        return Scene(image, boxes, found, mask)

    def background(self, drawn: torch.Generator) -> Tensor:
        """A square of a photograph, [3, S, S] in 0..1."""
        photo = self.photos[int(torch.randint(len(self.photos), (), generator=drawn))]
        low, high = CROPS
        shorter = min(photo.shape[1:])
        side = max(1, int(shorter * (low + (high - low) * float(torch.rand((), generator=drawn)))))
        top, left = (int(torch.randint(length - side + 1, (), generator=drawn)) for length in photo.shape[1:])
        crop = photo[:, top : top + side, left : left + side].float().div(255)
        return resized(crop, self.size)

    def two(self, drawn: torch.Generator) -> Tensor:
        """A background of two photographs, [3, S, S]: the second one in an ellipse, and faintly around it."""
        first, second = (turned(self.background(drawn), drawn) for _ in "ab")
        at = (torch.arange(self.size) + 0.5) / self.size
        down, right, high, wide, faint = torch.rand(5, generator=drawn).tolist()
        low, top = self.sides
        y, x = (
            (at - where) * 2 / (low + (top - low) * side) for where, side in ((down, high), (right, wide))
        )
        inside = y[:, None] ** 2 + x**2 < 1
        return first.lerp(second, torch.where(inside, 1.0, FAINT * faint))

    def place(
        self, garment: Tensor, owner: Tensor, number: int, drawn: torch.Generator
    ) -> tuple[Tensor, Tensor, int, int] | None:
        """The garment, its pixels [s, s], and its place; None if everywhere it hides too much of others."""
        low, high = self.sides
        side = round(self.size * (low + (high - low) * float(torch.rand((), generator=drawn))))
        side = min(max(side, 4), self.size)
        shade = resized(garment[None].float().div(255), side)[0]
        ink = shade > INK
        if not ink.any():
            return None
        whole = [int((owner == other).sum()) for other in range(number)]
        for _ in range(TRIES):
            top, left = (int(torch.randint(self.size - side + 1, (), generator=drawn)) for _ in "yx")
            under = owner[top : top + side, left : left + side][ink]
            hidden = [int((under == other).sum()) for other in range(number)]
            if all(gone <= (1 - SEEN) * all_of for gone, all_of in zip(hidden, whole, strict=True)):
                return shade, ink, top, left
        return None


class Kept(Dataset[Scene]):
    """The same scenes, each composed once and kept as bytes: 37 kB for one of 96 x 96 pixels."""

    def __init__(self, scenes: Scenes):
        self.scenes = scenes
        self.kept: dict[int, Scene] = {}

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> Scene:
        found = self.kept.get(index)
        if found is None:
            made = self.scenes[index]
            image, mask = made.image.mul(255).round_().to(torch.uint8), made.mask.to(torch.uint8)
            found = self.kept[index] = Scene(image, made.boxes, made.classes, mask)
        return found._replace(image=found.image.float().div_(255), mask=found.mask.long())


def turned(photo: Tensor, drawn: torch.Generator) -> Tensor:
    """A photograph [3, S, S], turned by quarters, its colors exchanged, perhaps mirrored and inverted."""
    quarters, mirror, invert = (int(torch.randint(n, (), generator=drawn)) for n in (4, 2, 3))
    photo = photo[torch.randperm(3, generator=drawn)].rot90(quarters, (1, 2))
    photo = photo.flip(2) if mirror else photo
    return 1 - photo if invert == 2 else photo


def bounds(inside: Tensor) -> Tensor:
    """The box around the true pixels of [S, S]: left, top, right, bottom."""
    rows, columns = inside.any(1).nonzero()[:, 0], inside.any(0).nonzero()[:, 0]
    return torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()


def resized(image: Tensor, size: int) -> Tensor:
    """[C, H, W] to [C, size, size], without aliasing."""
    return F.interpolate(image[None], (size, size), mode="bilinear", antialias=True)[0].clamp(0, 1)


def photographs(part: str) -> list[Tensor]:
    """scikit-image's photographs for "train" or "test", [3, H, W] uint8 each. MissingError without it."""
    try:
        from skimage import data
    except ImportError:
        raise need("scikit-image", "zoo", "scenes") from None
    found = []
    for name in PHOTOS[part]:
        image = torch.from_numpy(getattr(data, name)().copy())
        found.append(shrunk(image.expand(3, *image.shape) if image.ndim == 2 else image.permute(2, 0, 1)))
    return found


def shrunk(photo: Tensor) -> Tensor:
    """[3, H, W] uint8 with its shorter side at most SHORTER: crops of it are resized faster."""
    factor = SHORTER / min(photo.shape[1:])
    if factor >= 1:
        return photo
    shape = [round(factor * length) for length in photo.shape[1:]]
    small = F.interpolate(photo[None].float(), shape, mode="bilinear", antialias=True)
    return small[0].round().clamp(0, 255).to(torch.uint8)
