"""Tasks: Fashion-MNIST from valid and broken IDX files, digits, tasks from users' files."""

import gzip
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tersor.errors import RefusedError, SettingError, TaskError
from tersor.model import idx
from tersor.model.builtin_tasks import TASKS, digits, fashion_mnist, task_from
from tersor.model.import_object import import_object
from tersor.model.task import Task

TRAIN, TEST = 37, 11
FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def idx_bytes(array: np.ndarray) -> bytes:
    """The format by its definition: two zeros, 8 for unsigned bytes, the dimensions, sizes, values."""
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    made = {}
    for part, count in (("train", TRAIN), ("t10k", TEST)):
        made[f"{part}-images-idx3-ubyte"] = rng.integers(0, 256, (count, 28, 28), np.uint8)
        made[f"{part}-labels-idx1-ubyte"] = rng.integers(0, 10, count, np.uint8)
    return made


def write(folder: Path, compress: bool = True) -> dict[str, np.ndarray]:
    folder.mkdir(exist_ok=True)
    made = arrays()
    for name, array in made.items():
        data = idx_bytes(array)
        (folder / f"{name}.gz").write_bytes(gzip.compress(data)) if compress else (folder / name).write_bytes(
            data
        )
    return made


@pytest.mark.parametrize("compress", [True, False])
def test_fashion_mnist_holds_what_the_files_hold(tmp_path: Path, compress: bool) -> None:
    made = write(tmp_path, compress)
    task = fashion_mnist(tmp_path, batch=8, calibrate=12)
    x, y = (torch.cat(parts) for parts in zip(*task.batches("evaluate"), strict=True))
    assert x.shape == (TEST, 1, 28, 28)
    assert x.dtype == torch.float32
    expected = (made["t10k-images-idx3-ubyte"].astype(np.float64) / 255 - 0.2860) / 0.3530
    assert np.abs(x[:, 0].numpy() - expected).max() < 1e-5
    assert y.tolist() == made["t10k-labels-idx1-ubyte"].tolist()

    pixels = {row.tobytes(): label for row, label in pairs(made)}
    seen = [
        (np.rint((image[0].numpy() * 0.3530 + 0.2860) * 255).astype(np.uint8).tobytes(), int(label))
        for images, labels in task.batches("train")
        for image, label in zip(images, labels, strict=True)
    ]
    assert sorted(seen) == sorted(pixels.items()), "an epoch is each training image once, with its label"

    calibration = torch.cat([images for images, _ in task.batches("calibrate")])
    chosen = torch.randperm(TRAIN, generator=torch.Generator().manual_seed(0))[:12]
    again = (made["train-images-idx3-ubyte"][chosen.numpy()].astype(np.float64) / 255 - 0.2860) / 0.3530
    assert np.abs(calibration[:, 0].numpy() - again).max() < 1e-5


def pairs(made: dict[str, np.ndarray]) -> list[tuple[np.ndarray, int]]:
    labels = made["train-labels-idx1-ubyte"].tolist()
    return list(zip(made["train-images-idx3-ubyte"], labels, strict=True))


def test_the_digest_of_fashion_mnist_depends_on_every_file(tmp_path: Path) -> None:
    made = write(tmp_path)
    digest = fashion_mnist(tmp_path, calibrate=5).digest()
    assert digest == fashion_mnist(str(tmp_path), calibrate=5).digest()
    assert digest != fashion_mnist(tmp_path, calibrate=5, seed=1).digest()
    for name, array in made.items():
        changed = array.copy()
        changed[-1] = (changed[-1] + 1) % 10
        path = tmp_path / f"{name}.gz"
        whole = path.read_bytes()
        path.write_bytes(gzip.compress(idx_bytes(changed)))
        assert fashion_mnist(tmp_path, calibrate=5).digest() != digest, name
        path.write_bytes(whole)
    assert fashion_mnist(tmp_path, calibrate=5).digest() == digest


IMAGES, LABELS = FILES[0], FILES[1]
BROKEN: dict[str, tuple[str, Callable[[dict[str, np.ndarray]], bytes], str]] = {
    "cut off": (IMAGES, lambda a: idx_bytes(a[IMAGES])[:-1], "its header says .* but it has only"),
    "too long": (IMAGES, lambda a: idx_bytes(a[IMAGES]) + b"x", "its header says .* but it has more"),
    "empty": (IMAGES, lambda a: b"", "starts with nothing"),
    "header cut off": (IMAGES, lambda a: idx_bytes(a[IMAGES])[:10], "cut off in its header"),
    "labels for images": (
        IMAGES,
        lambda a: idx_bytes(a[LABELS]),
        "00 00 08 01.*3 dimensions starts with 00 00 08 03",
    ),
    "images for labels": (LABELS, lambda a: idx_bytes(a[IMAGES]), "1 dimension starts with 00 00 08 01"),
    "floats": (LABELS, lambda a: b"\0\0\x0d\1" + idx_bytes(a[LABELS])[4:], "starts with 00 00 0d 01"),
    "a huge claim": (
        LABELS,
        lambda a: b"\0\0\x08\1\xff\xff\xff\xff" + b"1" * 99,
        "4294967295 bytes, but it has only 99",
    ),
    "other sizes": (IMAGES, lambda a: idx_bytes(a[IMAGES][:, :8, :8].copy()), r"\[37, 8, 8\].* 28 x 28"),
    "no images": (IMAGES, lambda a: idx_bytes(a[IMAGES][:0]), r"\[0, 28, 28\]"),
    "other counts": (LABELS, lambda a: idx_bytes(a[LABELS][:-3]), "34 labels for the 37 images"),
    "eleven classes": (LABELS, lambda a: idx_bytes(a[LABELS] + 1), "a label is 10"),
}


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize(("name", "damage", "words"), BROKEN.values(), ids=list(BROKEN))
def test_broken_files_are_refused_by_name(
    tmp_path: Path, name: str, damage: Callable[[dict[str, np.ndarray]], bytes], words: str, compress: bool
) -> None:
    data = damage(write(tmp_path, compress))
    path = tmp_path / (f"{name}.gz" if compress else name)
    path.write_bytes(gzip.compress(data) if compress else data)
    with pytest.raises(TaskError, match=words) as caught:
        fashion_mnist(tmp_path, calibrate=5)
    assert str(path) in str(caught.value)


@given(st.integers(0, 400), st.integers(0, 255), st.booleans())
def test_damaged_gz_files_are_refused_or_read_whole(where: int, value: int, cut: bool) -> None:
    """For any damage to the compressed bytes: the right array or a TaskError, and nothing else."""
    array = np.arange(300, dtype=np.uint8)
    data = bytearray(gzip.compress(idx_bytes(array)))
    where %= len(data)
    if cut:
        del data[where:]
    else:
        data[where] = value
    path = Path(tempfile.gettempdir()) / f"damaged-{os.getpid()}.gz"
    path.write_bytes(data)
    try:
        found = idx.read(path, ndim=1)
    except TaskError as error:
        found = None
        message = str(error)
    path.unlink()
    if found is None:
        assert str(path) in message
    else:
        assert np.array_equal(found, array)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / f"{FILES[3]}.gz").unlink()
    with pytest.raises(TaskError, match=f"has no {FILES[3]} and no {FILES[3]}.gz"):
        fashion_mnist(tmp_path)
    with pytest.raises(TaskError, match="not a folder"):
        fashion_mnist(tmp_path / "nowhere")
    write(tmp_path)
    with pytest.raises(TaskError, match="calibrate=300, but .* 1 to 37"):
        fashion_mnist(tmp_path)


def test_the_real_fashion_mnist(fashion_mnist: Path) -> None:
    task = task_from(f"fashion-mnist:{fashion_mnist}")
    (x, y), data = next(iter(task.batches("calibrate"))), task.train.dataset.tensors  # type: ignore[union-attr]
    assert [len(item) for item in data] == [60000, 60000]
    assert torch.bincount(data[1]).tolist() == [6000] * 10
    assert abs(float(data[0].mean())) < 1e-3
    assert abs(float(data[0].std()) - 1) < 1e-3
    assert x.shape == (100, 1, 28, 28)
    assert len(y) == 100


def test_digits_has_a_stratified_and_reproducible_split() -> None:
    from sklearn.datasets import load_digits

    task = digits()
    x, y = (torch.cat(parts) for parts in zip(*task.batches("evaluate"), strict=True))
    train = task.train.dataset.tensors  # type: ignore[union-attr]
    assert x.shape == (797, 1, 8, 8)
    assert train[0].shape == (1000, 1, 8, 8)
    assert float(x.min()) == 0
    assert float(x.max()) == 1
    shares = torch.bincount(y) / 797 - torch.bincount(train[1]) / 1000
    assert shares.abs().max() < 0.002
    pixels, labels = load_digits(return_X_y=True)
    ours = torch.cat([train[0], x]).mul(16).reshape(-1, 64).numpy()
    rows = [(*a, b) for a, b in zip(ours.tolist(), torch.cat([train[1], y]).tolist(), strict=True)]
    assert sorted(rows) == sorted((*a, int(b)) for a, b in zip(pixels.tolist(), labels, strict=True))
    assert task.digest() == digits().digest()
    assert task.digest() != digits(seed=1).digest()
    assert sum(len(batch[0]) for batch in task.batches("calibrate")) == 300
    state = torch.get_rng_state()
    digits(seed=3)
    assert torch.equal(state, torch.get_rng_state())


FILE = """
from __future__ import annotations
from dataclasses import dataclass
import torch
from neighbor import SIZE
from tersor.model.task import Task

RUNS = []

@dataclass
class Settings:
    size: int = SIZE

def data():
    import neighbor
    RUNS.append(1)
    size = Settings().size
    return Task("mine", evaluate=[(torch.zeros(2, size), torch.zeros(2).long())])

TASK = data()

def wrong():
    return {"a": 1}

def breaks():
    return {}["key"]

def needs(argument):
    return TASK

NUMBER = 3
"""


@pytest.fixture
def user(tmp_path: Path) -> Path:
    (tmp_path / "neighbor.py").write_text("SIZE = 4\n")
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


def test_a_task_from_a_file(user: Path) -> None:
    before = list(sys.path)
    task = task_from(f"{user}:data")
    assert task.name == "mine"
    assert sys.path == before
    assert task_from(f"{user}:TASK") is task_from(f"{user}:TASK"), "a file is run once"
    assert task.target_of((1, 2)) == 2


def test_a_task_from_a_module(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(user.parent)
    (user.parent / "other.py").write_text(FILE)
    assert task_from("other:data").name == "mine"
    (user.parent / "kit").mkdir()
    (user.parent / "kit" / "__init__.py").write_text("")
    (user.parent / "kit" / "inner.py").write_text(FILE)
    assert task_from("kit.inner:data").name == "mine"
    assert task_from("mine.py:data").name == "mine"


def test_import_object_with_other_nouns(user: Path) -> None:
    (user.parent / "nets.py").write_text(
        "import torch\nclass Net(torch.nn.Linear):\n    def __init__(self): super().__init__(2, 3)\n"
    )
    model = import_object(f"{user.parent / 'nets.py'}:Net", "model", RefusedError, torch.nn.Module)
    assert model.out_features == 3
    with pytest.raises(RefusedError, match="model: .*did you mean 'Net'"):
        import_object(f"{user.parent / 'nets.py'}:net", "model", RefusedError, torch.nn.Module)


WRONG = {
    "misspelt": ("digit", "not a built-in task; did you mean 'digits'"),
    "nothing": ("", "not a built-in task"),
    "digits with more": ("digits:8", "takes no argument"),
    "no folder": ("fashion-mnist", "fashion-mnist:FOLDER"),
    "no file": ("{folder}/mime.py:data", "no file .*mime.py; did you mean 'mine.py'"),
    "not python": ("{folder}/notes.txt:data", "not a Python file"),
    "no function": ("{folder}/mine.py:dat", "has no 'dat'; did you mean 'data'"),
    "no name": ("{folder}/mine.py:", "is not file.py:name"),
    "returns a dict": ("{folder}/mine.py:wrong", "returned a dict, but it has to return a Task"),
    "raises": ("{folder}/mine.py:breaks", r"breaks failed with KeyError: 'key' \(mine.py, line 26\)"),
    "arguments": ("{folder}/mine.py:needs", "missing 1 required positional argument: 'argument'"),
    "number": ("{folder}/mine.py:NUMBER", "is a int, not a Task or a function"),
    "syntax": ("{folder}/syntax.py:data", "syntax.py failed with SyntaxError"),
    "import": ("{folder}/imports.py:data", r"No module named 'nowhere_at_all' \(imports.py, line 2\)"),
    "no module": ("nowhere_at_all.data:make", "nowhere_at_all.data failed with ModuleNotFoundError"),
}


@pytest.mark.parametrize(("text", "words"), WRONG.values(), ids=list(WRONG))
def test_names_without_a_task_are_refused(user: Path, text: str, words: str) -> None:
    (user.parent / "syntax.py").write_text("def data(:\n")
    (user.parent / "imports.py").write_text("\nimport nowhere_at_all\n")
    (user.parent / "notes.txt").write_text("notes")
    for _ in range(2):  # the second call does not find a partly executed module
        with pytest.raises(SettingError, match=words):
            task_from(text.format(folder=user.parent))


def test_the_table() -> None:
    assert list(TASKS) == ["digits", "fashion-mnist"]
    assert isinstance(task_from("digits"), Task)


def test_importing_tasks_imports_no_heavy_packages() -> None:
    heavy = "{'sklearn', 'accelerate', 'onnx', 'numba'}"
    code = f"import sys, tersor.model.builtin_tasks; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
