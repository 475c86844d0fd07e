"""Verify: a sound file passes; each fault is reported with its site, and the others are still checked."""

from pathlib import Path

import pytest
import torch
from forge import take_apart
from tiny import MODELS, tiny

from tersor.core.run import run
from tersor.core.state import State
from tersor.errors import StorageError
from tersor.forms import Dense
from tersor.io.container import TersorFile
from tersor.io.container_writer import save
from tersor.io.verify import verify
from tersor.model.sites import Site
from tersor.record.ledger import Ledger
from tersor.steps import Entropy, Prune


@pytest.mark.parametrize("kind", MODELS)
def test_a_sound_file(kind: str, tmp_path: Path) -> None:
    result = run(tiny(kind).model, [Prune(keep=0.5), Entropy()])
    save(result, tmp_path / "m.tersor")
    checks = verify(tmp_path / "m.tersor")
    assert [check.site for check in checks] == ["", *result.sites]
    assert all(check.sound for check in checks)
    assert checks[0].nbytes == (tmp_path / "m.tersor").stat().st_size
    assert sum(check.nbytes for check in checks[1:]) == result.nbytes


def saved(path: Path, **values: torch.Tensor) -> Path:
    sites = {name: Site(name, tuple(v.shape), str(v.dtype)[6:], "other") for name, v in values.items()}
    save(State(sites, {name: Dense(v) for name, v in values.items()}, {}, Ledger("", {})), path)
    return path


def test_each_damaged_site_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.tersor", **{name: torch.randn(30, 30) for name in "abcd"})
    data = bytearray(path.read_bytes())
    with TersorFile(path) as file:
        for name in "bd":
            data[file.source.slots[name].end - 1] ^= 0x40
    path.write_bytes(data)
    checks = {check.site: check for check in verify(path)}
    assert [name for name, check in checks.items() if not check.sound] == ["b", "d"]
    assert f"{path}: b: damaged: its digest is" in checks["b"].text


def test_other_files(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.tersor", w=torch.ones(2))
    path.write_bytes(path.read_bytes()[:50])
    (check,) = verify(path)
    assert (check.site, check.sound) == ("", False)
    assert "cut off" in check.text
    with pytest.raises(StorageError):
        verify(tmp_path / "gone.tersor")


def test_a_ledger_that_ends_with_other_digests(tmp_path: Path) -> None:
    save(run(tiny("mlp").model, [Prune(keep=0.5)]), tmp_path / "m.tersor")
    pieces = take_apart((tmp_path / "m.tersor").read_bytes())
    edits = [event for event in pieces.document["ledger"][0]["events"] if event[1]]
    edits[0][3:] = ["0" * 16]
    edits[1][0], edits[1][3:] = "gone", ["1" * 16]
    (tmp_path / "m.tersor").write_bytes(pieces.bytes())
    wrong = [check for check in verify(tmp_path / "m.tersor") if not check.sound]
    assert [check.site for check in wrong] == [list(pieces.document["sites"])[edits[0][0]], "gone"]
    assert "the ledger ends with form 0000000000000000" in wrong[0].text
    assert "a site that the file lacks" in wrong[1].text


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    path = saved(
        tmp_path / "m.tersor", good=torch.ones(2), bad=torch.tensor([1.0, float("nan"), float("inf")]),
        small=torch.tensor([float("nan"), 1.0]).to(torch.float8_e4m3fn),
    )  # fmt: skip
    wrong = {check.site: check.text for check in verify(path) if not check.sound}
    assert wrong == {"bad": "2 of 3 values are NaN or infinite", "small": "1 of 2 values are NaN or infinite"}
