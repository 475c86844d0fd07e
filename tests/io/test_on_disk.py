"""On disk: weights in their file, read in slices, give the same results as in memory; damage is reported."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forge import safetensors_file
from safetensors.torch import load_file, save_file
from torch import Tensor

from tersor.core.recipe import Recipe
from tersor.dtypes import CODES
from tersor.errors import FormatError
from tersor.forms import Dense
from tersor.forms.form import as_bytes
from tersor.io.checkpoint import Checkpoint
from tersor.io.container import TersorFile, load
from tersor.io.on_disk import OnDisk
from tersor.io.pack import pack
from tersor.io.unpack import unpack
from tersor.io.verify import verify
from tersor.steps import Cluster, Entropy, Prune, Quantize

SHAPES = {"one": (1,), "number": (), "odd": (7, 13), "even": (16, 8), "long": (301,)}
RECIPES = {
    "lossless": Recipe((Entropy(),)),
    "fast": Recipe((Entropy(coder="fast"),)),
    "8 bits": Recipe((Quantize(), Entropy())),
    "masked": Recipe((Prune(keep=0.3, per="tensor"), Entropy())),
    "masked and not coded": Recipe((Prune(keep=0.3, per="tensor"),)),
    "shared": Recipe((Cluster(entries=4), Entropy())),
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every weight stays in its file, and slices have 10 elements."""
    for module in ("safetensors_file", "checkpoint"):
        monkeypatch.setattr(f"tersor.io.{module}.HELD", 0)
    for module in ("forms.form", "forms.coded", "io.on_disk", "io.validate"):
        monkeypatch.setattr(sys.modules[f"tersor.{module}"], "SLICE", 10)  # forms.coded is a function too


def values(dtype: torch.dtype) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    wide = {name: torch.randn(shape, generator=rng) * 3 for name, shape in SHAPES.items()}
    return {name: value.abs().to(dtype) for name, value in wide.items()} | {
        "none": torch.zeros(0, 3).to(dtype)
    }


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("write", [save_file, torch.save])
@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_same_as_in_memory(
    dtype: torch.dtype, write: Callable[[dict[str, Tensor], Path], None], tmp_path: Path
) -> None:
    given = values(dtype)
    write(given, tmp_path / "w")
    with Checkpoint(tmp_path / "w") as source:
        for name, value in given.items():
            form, plain = source.form(name), Dense(value)
            assert isinstance(form, OnDisk) == (value.numel() > 0)
            assert (form.dtype, form.shape, form.nbytes) == (plain.dtype, plain.shape, plain.nbytes)
            assert form.digest == plain.digest
            assert bytes(as_bytes(form.array)) == bytes(as_bytes(value))
            slices = [bytes(as_bytes(part)) for part in form.slices()]
            assert slices == [bytes(as_bytes(part)) for part in plain.slices()]
            count = value.numel()
            assert bytes(form.reader()(count // 3, count)) == bytes(plain.reader()(count // 3, count))


@pytest.mark.usefixtures("small")
def test_a_noncontiguous_tensor_is_read_into_memory(tmp_path: Path) -> None:
    whole = torch.arange(24).reshape(4, 6)
    torch.save({"t": whole.T, "cut": whole[1:, 2:]}, tmp_path / "w.pt")
    with Checkpoint(tmp_path / "w.pt") as source:
        for name, expected in (("t", whole.T), ("cut", whole[1:, 2:])):
            assert not isinstance(source.form(name), OnDisk)
            assert torch.equal(source.form(name).array, expected)


def test_walking_the_tree_reads_nothing() -> None:
    def read(begin: int, end: int) -> Tensor:
        raise AssertionError("read")

    form = OnDisk(torch.float32, (3, 5), read)
    assert [node for _, node in form.walk()] == [form]
    assert (form.nbytes, form.shape, form.settings(), form.children()) == (60, (3, 5), {}, {})


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", RECIPES)
def test_packed_to_the_same_bytes(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    given = {f"{kind}.{n}": v for kind in ("float32", "bfloat16", "float16") for n, v in
             values(getattr(torch, kind)).items()}  # fmt: skip
    given |= {
        "mask": torch.tensor([True, False] * 30),
        "steps": torch.arange(70),
        "wide": torch.randn(9, 9).double(),
    }
    save_file(given, tmp_path / "w.safetensors")
    found = set()
    for workers in (1, 2):
        pack(tmp_path / "w.safetensors", tmp_path / "m.tersor", RECIPES[name], workers=workers)
        unpack(tmp_path / "m.tersor", tmp_path / "u.safetensors", workers=workers)
        found.add(((tmp_path / "m.tersor").read_bytes(), (tmp_path / "u.safetensors").read_bytes()))
    assert all(row.sound for row in verify(tmp_path / "m.tersor"))
    request.getfixturevalue("monkeypatch").undo()
    pack(tmp_path / "w.safetensors", tmp_path / "m.tersor", RECIPES[name])
    unpack(tmp_path / "m.tersor", tmp_path / "u.safetensors")
    found.add(((tmp_path / "m.tersor").read_bytes(), (tmp_path / "u.safetensors").read_bytes()))
    assert len(found) == 1
    if len(RECIPES[name].steps) == 1 and name != "masked and not coded":
        back = load_file(tmp_path / "u.safetensors")
        assert all(bytes(as_bytes(back[n])) == bytes(as_bytes(v)) for n, v in given.items())


@pytest.mark.usefixtures("small")
def test_nan_in_a_late_slice_is_refused(tmp_path: Path) -> None:
    from tersor.errors import RefusedError

    weight = torch.ones(30, 10)
    weight[29, 9] = torch.nan
    save_file({"fc.weight": weight}, tmp_path / "w.safetensors")
    with pytest.raises(RefusedError, match=r"fc\.weight"):
        pack(tmp_path / "w.safetensors", tmp_path / "m.tersor", RECIPES["lossless"])
    assert not (tmp_path / "m.tersor").exists()


@pytest.mark.usefixtures("small")
def test_an_invalid_bool_is_refused_when_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(
        safetensors_file({"m": ("BOOL", [40], b"\x01" * 39 + b"\x02")}, None)
    )
    with pytest.raises(FormatError, match="m: a bool is 2"):
        pack(tmp_path / "w.safetensors", tmp_path / "m.tersor", RECIPES["lossless"])


@pytest.mark.usefixtures("small")
def test_a_file_that_becomes_shorter_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"w": torch.randn(40, 40)}, path)
    with Checkpoint(path) as source:
        form = source.form("w")
        path.write_bytes(path.read_bytes()[:-4])
        with pytest.raises(FormatError, match=r"w\.safetensors: it became shorter while it was read"):
            list(form.slices())


@pytest.mark.usefixtures("small")
def test_damage_in_any_slice_names_the_tensor(tmp_path: Path) -> None:
    save_file({"a.weight": torch.randn(40, 40), "b.weight": torch.randn(40, 40)}, tmp_path / "w.safetensors")
    path = tmp_path / "m.tersor"
    pack(tmp_path / "w.safetensors", path, RECIPES["fast"])
    with TersorFile(path) as file:
        place = file.places.found["b.weight"]
    for at in (place.begin, (place.begin + place.end) // 2, place.end - 1):
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        (tmp_path / "d.tersor").write_bytes(data)
        with pytest.raises(FormatError, match=r"d\.tersor: b\.weight: damaged"):
            unpack(tmp_path / "d.tersor", tmp_path / "u.safetensors")
        with pytest.raises(FormatError, match=r"b\.weight: damaged"):
            load(tmp_path / "d.tersor")
        assert not (tmp_path / "u.safetensors").exists()
