"""A small detector that torch.export cannot trace: images of different sizes in, the boxes that score out."""

import torch
from torch import Tensor, nn

import tersor

WIDE = 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(WIDE, WIDE, 3, padding=1, bias=False), nn.BatchNorm2d(WIDE)
        self.two = nn.Conv2d(WIDE, WIDE, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.two(self.norm(self.one(x)).relu())).relu()


class Backbone(nn.Module):
    """Images -> maps by name, as torchvision's backbones give them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, WIDE, 3, stride=2, padding=1), nn.BatchNorm2d(WIDE)
        self.blocks = nn.Sequential(Block(), Block(), Block())
        self.down = nn.Conv2d(WIDE, 12, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        fine = self.blocks(self.norm(self.stem(x)).relu())
        return {"fine": fine, "coarse": self.down(fine).relu()}


class Head(nn.Module):
    """Maps -> scores and boxes of each place; `scale` is given by name."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Conv2d(12, 16, 1)
        self.score, self.box = nn.Conv2d(16, 1, 1), nn.Conv2d(16, 4, 1)

    def forward(self, maps: list[Tensor], *, scale: Tensor) -> dict[str, Tensor]:
        x = self.hidden(maps[-1]).relu()
        return {"score": self.score(x).flatten(1), "box": (self.box(x) * scale).flatten(2)}


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = Backbone(), Head()
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, images: list[Tensor]) -> object:
        high, wide = (max(image.shape[axis] for image in images) for axis in (1, 2))
        x = torch.zeros(len(images), 3, high, wide, dtype=images[0].dtype)
        for at, image in enumerate(images):
            x[at, :, : image.shape[1], : image.shape[2]].copy_(image)
        found = self.head(list(self.backbone(x).values()), scale=self.scale)
        if self.training:
            return found
        kept = []
        for score, box in zip(found["score"], found["box"], strict=True):
            best = score.sigmoid() > 0.5
            best = best if bool(best.any()) else score >= score.max()  # a branch on the values: no graph
            kept.append({"scores": score[best], "boxes": box.T[best]})
        return kept


def detector(seed: int = 0) -> Detector:
    """With statistics of its batch norms from random images, in eval mode."""
    torch.manual_seed(seed)
    net = Detector()
    for images, _ in batches(6, seed=seed):
        net(images)
    return net.eval()


def batches(count: int, *, seed: int = 0) -> list[tuple[list[Tensor], Tensor]]:
    random = torch.Generator().manual_seed(seed)
    sizes = [(12, 16), (16, 12), (16, 16)]
    return [([torch.rand(3, *size, generator=random) for size in sizes], torch.ones(3)) for _ in range(count)]


def loss(output: dict[str, Tensor], target: Tensor) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(output["score"].mean(1), target)


def total(output: list[dict[str, Tensor]], target: Tensor) -> Tensor:
    """How much the boxes that were kept score, for each image."""
    return torch.stack([each["scores"].sum() for each in output])


def task(part: object = "backbone", **given: object) -> tersor.Task:
    every = batches(8, seed=3)
    return tersor.Task(
        "boxes", evaluate=every[:2], calibrate=every[2:6], train=every[6:], loss=loss, metric=total,
        feed=lambda model, batch: model(batch[0]), part=part, **given,
    )  # fmt: skip
