"""Golden files: fixed bytes. Files of format 1 stay readable, and refused files stay refused."""

import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from forge import ROOT, header_of, reference, take_apart

from tersor.errors import FormatError
from tersor.io.container import load

GOLDEN = ROOT / "tests" / "golden"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
HELD = json.loads((GOLDEN / "held.json").read_text())
REFUSED = json.loads((GOLDEN / "refused.json").read_text())


def load_make() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_make", GOLDEN / "make.py")
    if spec is None or spec.loader is None:
        raise FileNotFoundError("tests/golden/make.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["golden_make"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden files, written again."""
    folder = tmp_path_factory.mktemp("golden")
    load_make().write(folder)
    return folder


def sha(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()[:16]


@pytest.mark.parametrize("name", EXPECTED)
def test_file_decodes_to_the_expected_tensors(name: str) -> None:
    for site, tensor in load(GOLDEN / f"{name}.tersor").state_dict().items():
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        found = [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), sha(raw)]
        assert found == EXPECTED[name][site]


@pytest.mark.parametrize("name", EXPECTED)
def test_second_reader_agrees(name: str) -> None:
    found = reference.read(GOLDEN / f"{name}.tersor")
    assert EXPECTED[name] == {
        site: [value.dtype, list(value.values.shape), sha(value.values.tobytes())]
        for site, value in found.items()
    }


@pytest.mark.parametrize("name", HELD)
def test_file_holds_the_expected_rest(name: str) -> None:
    state = load(GOLDEN / f"{name}.tersor")
    assert HELD[name] == {
        "digest": state.digest, "ledger": state.ledger.digest,
        "kept": {site: {str(a): list(i) for a, i in axes.items()} for site, axes in state.kept.items()},
        "changes": [[type(change).__name__.lower(), *vars(change).values()] for change in state.changes],
        "grids": {edge: grid.digest for edge, grid in state.grids.items()},
        "attachments": {name: sha(data) for name, data in state.attachments.items()},
    }  # fmt: skip


@pytest.mark.parametrize("name", HELD)
def test_second_reader_agrees_on_all_that_it_holds(name: str) -> None:
    file = reference.opened(GOLDEN / f"{name}.tersor")
    assert HELD[name] == {
        "digest": file.digest, "ledger": file.ledger,
        "kept": {site: {str(a): i for a, i in axes.items()} for site, axes in file.kept.items()},
        "changes": file.changes, "grids": {edge: reference.digest(grid) for edge, grid in file.grids.items()},
        "attachments": {name: sha(data) for name, data in file.attachments.items()},
    }  # fmt: skip


@pytest.mark.parametrize("name", HELD)
def test_readers_agree_on_the_ledger(name: str) -> None:
    entries = load(GOLDEN / f"{name}.tersor").ledger.entries
    assert [
        {"step": e.step, "name": e.name, "about": e.site, "how": e.how, "before": e.before, "after": e.after,
         "kind": e.kind, "text": e.text, "data": dict(e.data)}
        for e in entries
    ] == reference.opened(GOLDEN / f"{name}.tersor").events  # fmt: skip


def contents(path: Path) -> tuple[object, ...]:
    """All of a file except how its text and attachments were deflated: versions of zlib may differ there."""
    pieces = take_apart(path.read_bytes())
    for name, entry in pieces.document.get("attachments", {}).items():
        if entry.get("deflated"):
            data = reference.opened(path).attachments[name]
            pieces.tensors[f"attachment:{name}"] = "U8", [len(data)], data
    metadata = None if pieces.tiny else header_of(path.read_bytes())[0]["__metadata__"]
    return json.dumps(pieces.document), pieces.small, list(pieces.tensors.items()), metadata


@pytest.mark.parametrize("name", EXPECTED)
def test_writer_writes_the_same_bytes(name: str, made: Path) -> None:
    assert contents(made / f"{name}.tersor") == contents(GOLDEN / f"{name}.tersor")


def test_tables_are_those_that_make_writes(made: Path) -> None:
    for table in ("expected.json", "held.json", "refused.json"):
        assert (made / table).read_text() == (GOLDEN / table).read_text()


def test_all_files_are_in_the_tables() -> None:
    assert {path.stem for path in GOLDEN.glob("*.tersor")} == set(EXPECTED)
    assert {path.stem for path in (GOLDEN / "refused").iterdir()} == set(REFUSED)


@pytest.mark.parametrize("name", REFUSED)
def test_bad_file_is_refused(name: str) -> None:
    path = GOLDEN / "refused" / f"{name}.tersor"
    with pytest.raises(FormatError) as caught:
        load(path)
    assert str(caught.value).startswith(str(path))
    assert REFUSED[name] in str(caught.value)


@pytest.mark.parametrize("name", REFUSED)
def test_second_reader_refuses_it_too(name: str) -> None:
    with pytest.raises(reference.BadFile):
        reference.read(GOLDEN / "refused" / f"{name}.tersor")


def test_dictionary_is_in_the_page() -> None:
    from tersor.io.dictionary import DICTIONARY, TINY_DICTIONARY

    assert reference.DICTIONARY == DICTIONARY
    assert reference.TINY_DICTIONARY == TINY_DICTIONARY
    assert 2500 < len(DICTIONARY) < 32768
    assert 1000 < len(TINY_DICTIONARY) < 32768
