"""The contract of patches: any two results of one network, of whatever steps, both ways, byte for byte.

A step is tested as soon as it is in STEPS. Besides: other settings, chains of steps, a network in half
precision, and one with other layers.
"""

import functools
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import SMALL, tiny
from torch import nn

from tersor.core.recipe import Recipe
from tersor.core.run import run
from tersor.core.state import start
from tersor.io.container import load
from tersor.io.container_writer import save
from tersor.io.pack import pack
from tersor.io.patch.diff import HEAD, diff
from tersor.io.patch.patch import patch
from tersor.steps import STEPS, Cluster, Entropy, Fold, Prune, Quantize, Rdoq, Slim

DEAR = ("export",)  # it changes no weight
OTHERS: dict[str, tuple[Any, ...]] = {
    "rdoq again": (Rdoq(bits=3, per="both"),),
    "rdoq, other grid": (Rdoq(bits=6, per="both"),),
    "groups": (Quantize(bits=4, per="group", group=4), Entropy()),
    "zeros": (Quantize(bits=4, symmetric=False), Entropy(coder="fast")),
    "grids": (Quantize(bits=8, activations=8), Entropy()),
    "chain": (Slim(unmet="nearest"), Prune(keep=0.5), Cluster(entries=4), Entropy()),
    "pruned, rdoq": (Prune(keep=0.4), Rdoq()),
    "folded, rdoq": (Fold(), Rdoq(bits=6)),
}


def of_step(name: str, folder: Path) -> None:
    steps = OTHERS.get(name) or (STEPS[name](**SMALL.get(name, {})),)
    net = tiny("mlp")
    save(run(net.model, Recipe(steps), net.task, out=folder), folder / name)


def given(folder: Path) -> None:
    save(start(tiny("mlp").model), folder / "given")


def half(folder: Path) -> None:
    """The same names in float16."""
    save_file({name: value.half() for name, value in tiny("mlp").model.state_dict().items()}, folder / "h")
    pack(folder / "h", folder / "half", Recipe((Quantize(bits=4), Entropy())))


def wider(folder: Path) -> None:
    """A layer more, another of another shape, one less."""
    values = dict(tiny("mlp").model.state_dict())
    values["layers.0.weight"] = nn.functional.pad(values["layers.0.weight"], (0, 2, 0, 1))
    values["added.weight"] = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    del values["layers.2.weight"]
    save_file(values, folder / "w")
    pack(folder / "w", folder / "wider", Recipe((Quantize(bits=5, per="group", group=3), Entropy())))


MADE: dict[str, Callable[[Path], None]] = {
    **{name: functools.partial(of_step, name) for name in (*STEPS, *OTHERS) if name not in DEAR},
    "given": given,
    "half": half,
    "wider": wider,
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    for make in MADE.values():
        make(folder)
    return folder


def partners(first: str) -> list[str]:
    """All results of a single step, and a fourth of the others: every pair of those is in the long test."""
    others = [name for name in MADE if name not in STEPS]
    single = [name for name in MADE if name in STEPS]
    some = others[zlib.crc32(first.encode()) % 4 :: 4]
    return single + some if first in STEPS else single[::4] + some


PAIRS = [(first, second) for first in MADE for second in partners(first) if first != second]


@pytest.mark.sampled
@pytest.mark.parametrize(("first", "second"), PAIRS, ids=lambda name: name)
def test_a_patch_to_another_result(first: str, second: str, results: Path, tmp_path: Path) -> None:
    """Every ordered pair of steps: each is OLD with every other as NEW."""
    there_and_back(first, [second], results, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("first", MADE)
def test_a_patch_to_any_other_result(first: str, results: Path, tmp_path: Path) -> None:
    there_and_back(first, list(MADE), results, tmp_path)


def there_and_back(first: str, others: list[str], results: Path, folder: Path) -> None:
    for second in others:
        old, new = results / first, results / second
        done = diff(old, new, folder / "p")
        assert patch(old, folder / "p", folder / "out") == new.stat().st_size
        assert (folder / "out").read_bytes() == new.read_bytes(), second
        assert done.nbytes <= new.stat().st_size + HEAD, second
        assert load(folder / "out").digest == load(new).digest


def test_a_patch_of_unlike_files_carries_the_new_one(tmp_path: Path) -> None:
    """Bytes that nothing shortens: the patch has those of NEW and a header."""
    for seed, word in enumerate(("old", "new")):
        rng = torch.Generator().manual_seed(seed)
        many = {f"t{n}": torch.randint(256, (9,), generator=rng, dtype=torch.uint8) for n in range(30)}
        save_file(many, tmp_path / word)
    done = diff(tmp_path / "old", tmp_path / "new", tmp_path / "p")
    assert done.nbytes <= (tmp_path / "new").stat().st_size + HEAD
    patch(tmp_path / "old", tmp_path / "p", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == (tmp_path / "new").read_bytes()
