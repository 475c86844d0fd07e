"""Built-in tasks: digits and fashion-mnist:FOLDER, and the user's by file.py:function.

digits          1,797 images of 8 x 8, 10 classes, inside scikit-learn; 1,000 to train, 797 to evaluate
fashion-mnist   60,000 + 10,000 images of 28 x 28, 10 classes, Xiao, Rasul, Vollgraf 2017; four IDX files
Cost: the data is held in memory as float32; Fashion-MNIST takes 220 MB.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tersor.errors import SettingError, TaskError, did_you_mean, need
from tersor.model import idx
from tersor.model.import_object import import_object
from tersor.model.loader import TensorBatches
from tersor.model.task import Task

CALIBRATE = 300  # default number of calibration images, as in published comparisons of calibration sizes
CLASSES = 10
FASHION_MEAN, FASHION_STD = 0.2860, 0.3530  # of the training images' pixels, scaled to 0..1


def digits(*, batch: int = 64, calibrate: int = CALIBRATE, seed: int = 0) -> Task:
    """Scikit-learn's handwritten digits: x [B, 1, 8, 8] float32 in 0..1, y [B] int64 in 0..9.

    `batch` images a training batch, `calibrate` training images to calibrate with, `seed` of the split, which
    is stratified by class. MissingError without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise need("scikit-learn", "data", "task 'digits'") from None
    pixels, labels = load_digits(return_X_y=True)  # [1797, 64] in 0..16, [1797]
    split = train_test_split(pixels, labels, train_size=1000, stratify=labels, random_state=seed)
    train, test = (torch.from_numpy(item).float().div(16).reshape(-1, 1, 8, 8) for item in split[:2])
    train_y, test_y = (torch.from_numpy(item).long() for item in split[2:])
    return _images("digits", (train, train_y), (test, test_y), batch=batch, calibrate=calibrate, seed=seed)


def fashion_mnist(folder: str | Path, *, batch: int = 128, calibrate: int = CALIBRATE, seed: int = 0) -> Task:
    """Fashion-MNIST from its four IDX files (.gz or not): x [B, 1, 28, 28] float32, mean 0 and deviation 1.

    `batch` images a training batch, `calibrate` training images chosen by `seed` to calibrate with. TaskError
    names a file that is missing, truncated or of another kind than its name.
    """
    folder = Path(folder).expanduser()
    sets = []
    for part in ("train", "t10k"):
        images, labels = garments(folder, part)
        pixels = images.float().div_(255).sub_(FASHION_MEAN).div_(FASHION_STD)  # [N, 28, 28]
        sets.append((pixels[:, None], labels))
    return _images("fashion-mnist", sets[0], sets[1], batch=batch, calibrate=calibrate, seed=seed)


def garments(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Fashion-MNIST's images [N, 28, 28] uint8 and labels [N], of "train" or "t10k". TaskError names a file
    that is missing, truncated or of another kind than its name."""
    image_file = idx.find(folder, f"{part}-images-idx3-ubyte")
    label_file = idx.find(folder, f"{part}-labels-idx1-ubyte")
    images, labels = idx.read(image_file, ndim=3), idx.read(label_file, ndim=1)
    if images.shape[1:] != (28, 28) or not len(images):
        raise TaskError(f"{image_file}: it holds {list(images.shape)}, but needs images of 28 x 28.")
    if len(labels) != len(images):
        raise TaskError(
            f"{label_file}: {len(labels)} labels for the {len(images)} images of {image_file.name}."
        )
    if labels.max() >= CLASSES:
        raise TaskError(f"{label_file}: a label is {labels.max()}, but the {CLASSES} classes are 0 to 9.")
    return torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64))


def _images(
    name: str,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    batch: int,
    calibrate: int,
    seed: int,
) -> Task:
    """A classification task for images in memory, (x [N, 1, H, W], y [N]) each."""
    if not 1 <= calibrate <= len(train[0]):
        raise TaskError(
            f"{name}: calibrate={calibrate}, but it is a number of training images, 1 to {len(train[0])}"
        )
    chosen = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(seed))[:calibrate]
    data = hashlib.sha256(f"{name} batch={batch} calibrate={calibrate} seed={seed};".encode())
    for tensor in (*train, *test):
        data.update(tensor.numpy().data)
    return Task(
        name,
        evaluate=TensorBatches(*test, batch=256),
        calibrate=TensorBatches(*(item[chosen] for item in train), batch=100),
        train=TensorBatches(*train, batch=batch, shuffle=True),
        fingerprint=data.hexdigest(),
    )


TASKS: dict[str, Callable[..., Task]] = {"digits": digits, "fashion-mnist": fashion_mnist}


def task_from(text: str) -> Task:
    """The task of this name: "digits", "fashion-mnist:FOLDER", "file.py:function", "package.module:function".

    A function is called without arguments and returns a Task. SettingError if there is no such task, as for a
    model; TaskError if its data cannot be read.
    """
    word, colon, rest = text.partition(":")
    if word == "digits":
        if colon:
            raise SettingError(f"task: {text!r}, but digits takes no argument")
        return digits()
    if word == "fashion-mnist":
        if not rest:
            raise SettingError(f"task: {text!r} needs the folder of the four IDX files: fashion-mnist:FOLDER")
        return fashion_mnist(rest)
    if not colon:
        raise SettingError(
            f"task: {text!r} is not a built-in task; {did_you_mean(text, TASKS)}. A task of your own is "
            "file.py:function or package.module:function, with a function that returns a Task."
        )
    task: Task = import_object(text, "task", SettingError, Task)
    return task
