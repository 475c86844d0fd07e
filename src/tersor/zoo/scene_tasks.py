"""Scene tasks: four tasks on composed scenes. Words: scenes:KIND:FOLDER, FOLDER holds Fashion-MNIST.

labels    one garment a scene; the class is asked                     accuracy
boxes     1 to 3 garments; their boxes and classes                    AP50 (mAP for task(..., figure="mAP"))
anchors   the same for a detector with anchors: anchors.py            AP50
masks     1 to 3 garments; the class of each pixel, 0 the background  mean IoU
Scenes are composed when they are first read, about 800 a second on one core, and kept: 37 kB each. Training
mirrors half of them, other ones in each epoch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from tersor.errors import TaskError, did_you_mean
from tersor.model.builtin_tasks import garments
from tersor.model.task import Logits, Task
from tersor.zoo.anchors import anchors, multibox_loss, seen
from tersor.zoo.architectures import entry
from tersor.zoo.boxes import average_precision, cells, detection_loss, detections
from tersor.zoo.scenes import BORDER, GARMENTS, SIZE, Kept, Scene, Scenes, photographs

METRICS = {"labels": "accuracy", "boxes": "AP50", "anchors": "AP50", "masks": "mean IoU"}  # of each kind
# With 10,000 training scenes seen more often, detectors name 94 % of those garments right and 75 % of others.
TRAIN, TEST, CALIBRATE = 30_000, 1_000, 300  # scenes
# Scenes a training batch. Segmenters learn more in the same epochs from smaller ones.
BATCHES = {"labels": 24, "boxes": 24, "anchors": 24, "masks": 8}
ALONE = (0.5, 0.9)  # side of a garment that is alone, as a share of the scene's
PARTS = {"train": "train", "test": "t10k"}
MEAN, DEVIATION = 0.45, 0.25  # of the pixels, about
BACKGROUND = 0.25  # weight of the background in the loss of masks: most pixels are background
DEBIAN = "/usr/share/datasets/fashion-mnist"


def scene_task(
    kind: str, folder: str | Path = DEBIAN, *, train: int = TRAIN, test: int = TEST,
    calibrate: int = CALIBRATE, batch: int | None = None, size: int = SIZE, seed: int = 0,
    figure: str = "AP50",
) -> Task:  # fmt: skip
    """The task `kind` with so many scenes of `size` x `size` pixels.

    Inputs are [B, 3, size, size] float32, mean 0 and deviation 1. Targets: labels [B]; boxes a tuple of
    [B, 3, 4] in pixels and classes [B, 3], -1 in rows that pad; masks [B, size, size], 0 to 10.
    TaskError if the folder lacks Fashion-MNIST's files, MissingError without scikit-image.
    """
    if kind not in METRICS:
        raise TaskError(f"scenes: {kind!r} is none of its tasks; {did_you_mean(kind, METRICS)}")
    if calibrate > train:
        raise TaskError(f"scenes: calibrate={calibrate}, but there are train={train} training scenes")
    folder, batch = Path(folder).expanduser(), batch or BATCHES[kind]
    shape: dict[str, Any] = {"most": 1, "sides": ALONE} if kind == "labels" else {}
    digest = hashlib.sha256(f"scenes {kind} {train} {test} {calibrate} {batch} {size} {seed}".encode())
    sets: dict[str, Kept] = {}
    for part, count in (("train", train), ("test", test)):
        images, labels = garments(folder, PARTS[part])
        photos = photographs(part)
        for tensor in (images, labels, *photos):
            digest.update(tensor.contiguous().numpy().data)
        own = 2 * seed + (part == "test")
        sets[part] = Kept(
            Scenes(images, labels, photos, count, seed=own, size=size, varied=part == "train", **shape)
        )
    few = torch.utils.data.Subset(sets["train"], range(calibrate))
    collate, mirrored = COLLATE[kind], partial(with_mirrored, COLLATE[kind])
    return Task(
        f"scenes {kind}",
        train=DataLoader(sets["train"], batch, shuffle=True, drop_last=True, collate_fn=mirrored),
        calibrate=DataLoader(few, min(100, calibrate), collate_fn=collate),
        evaluate=DataLoader(sets["test"], 50, collate_fn=collate),
        fingerprint=digest.hexdigest(),
        **settings(kind, size, figure),
    )


def scene_task_from(text: str) -> Task:
    """The task of the words scenes:KIND, or zoo:NAME for an architecture's; :FOLDER may follow."""
    word, _, rest = text.partition(":")
    name, _, folder = rest.partition(":")
    return scene_task(entry(name).task if word == "zoo" else name, folder or DEBIAN)


def settings(kind: str, size: int, figure: str) -> dict[str, Any]:
    """Loss, metric and logits of a kind."""
    if kind in DETECTORS:
        places, loss, detected, logits = DETECTORS[kind]
        at = places(size, size)
        metric = average_precision(partial(detected, at), figure)
        return {"loss": partial(loss, at), "metric": metric, "logits": logits}
    return {"loss": mask_loss, "metric": "mean_iou"} if kind == "masks" else {}


def compared(output: tuple[Tensor, Tensor]) -> tuple[Logits, Logits]:
    """What distillation compares of a detector: scores of yes or no, and distances."""
    return Logits(output[1], "binary"), Logits(output[0], "regression")


def compared_to_anchors(output: tuple[Tensor, Tensor]) -> tuple[Logits, Logits]:
    """The same of a detector with anchors: scores of classes, and offsets."""
    return Logits(output[1], "classes", 2), Logits(output[0], "regression")


def mask_loss(output: Tensor, target: Tensor) -> Tensor:
    weight = output.new_ones(output.shape[1])
    weight[0] = BACKGROUND
    return F.cross_entropy(output, target, weight)


def with_mirrored(collate: Callable[[list[Scene]], Any], scenes: list[Scene]) -> Any:
    """A batch with half of its scenes mirrored, drawn from torch's generator, which a training seeds."""
    draws = torch.rand(len(scenes)) < 0.5
    return collate([mirrored(scene) if draw else scene for scene, draw in zip(scenes, draws, strict=True)])


def mirrored(scene: Scene) -> Scene:
    """The scene with left and right exchanged."""
    width = scene.image.shape[2]
    left, top, right, bottom = scene.boxes.unbind(1)
    boxes = torch.stack([width - right, top, width - left, bottom], 1)
    return Scene(scene.image.flip(2), boxes, scene.classes, scene.mask.flip(1))


def normalized(scenes: list[Scene]) -> Tensor:
    return torch.stack([scene.image for scene in scenes]).sub_(MEAN).div_(DEVIATION)


def with_label(scenes: list[Scene]) -> tuple[Tensor, Tensor]:
    return normalized(scenes), torch.stack([scene.classes[0] for scene in scenes])


def with_mask(scenes: list[Scene]) -> tuple[Tensor, Tensor]:
    return normalized(scenes), torch.stack([scene.mask for scene in scenes])


def with_boxes(scenes: list[Scene]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    boxes = torch.zeros(len(scenes), GARMENTS, 4)
    classes = torch.full((len(scenes), GARMENTS), BORDER)
    for row, scene in enumerate(scenes):
        boxes[row, : len(scene.boxes)], classes[row, : len(scene.boxes)] = scene.boxes, scene.classes
    return normalized(scenes), (boxes, classes)


COLLATE: dict[str, Callable[[list[Scene]], Any]] = {
    "labels": with_label,
    "boxes": with_boxes,
    "anchors": with_boxes,
    "masks": with_mask,
}
# Kind of detector -> (its cells or anchors, loss, decoding, what distillation compares).
DETECTORS: dict[str, tuple[Callable[..., Any], ...]] = {
    "boxes": (cells, detection_loss, detections, compared),
    "anchors": (anchors, multibox_loss, seen, compared_to_anchors),
}
