"""Damaged and forged files: refused with a FormatError, or read; never another error, and both readers agree.

Three kinds: bytes changed anywhere; a text changed and its size and CRC put right; a text changed in meaning
with every digest put right, so that nothing but the rules of docs/format.md stands in the way.
"""

import os
import random
import time
from pathlib import Path
from typing import Any

import fuzz
import fuzz_inputs
import pytest
import torch
from forge import ROOT, reference, take_apart
from fuzz import GOLDEN, NAMES, SEEDS, changed_text, forged, mutated, signed

from tersor.errors import FormatError
from tersor.io.container import load

ROUNDS = 20 if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else 1
SECONDS = 5  # one read, on a slow machine


def readers(path: Path, data: bytes) -> tuple[dict[str, torch.Tensor] | None, dict[str, Any] | None]:
    """What the two readers decode from a file; None if they refuse it."""
    path.write_bytes(data)
    began, first, said, whole = time.perf_counter(), None, str(path), ("", "")
    try:
        loaded = load(path)
        first = loaded.state_dict()
        whole = loaded.digest, loaded.ledger.digest
    except FormatError as error:
        said = str(error)
    assert said.startswith(str(path))
    assert time.perf_counter() - began < SECONDS
    try:
        file = reference.opened(path)
        second = file.tensors
        assert first is None or whole == (file.digest, file.ledger)
        assert first is None or loaded.attachments == file.attachments
    except reference.BadFile:
        second = None
    return first, second


def agree(path: Path, data: bytes) -> bool:
    """Whether both readers read the file. Fails if only one does or if results differ."""
    first, second = readers(path, data)
    assert (first is None) == (second is None), f"{'the second' if first is None else 'the first'} reads it"
    if first is None or second is None:
        return False
    assert first.keys() == second.keys()
    for name, value in first.items():
        raw = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert list(value.shape) == list(second[name].values.shape)
        # The bits of a NaN are not fixed.
        assert raw == second[name].values.tobytes() or bool(value.isnan().any())
    return True


def test_changed_bytes(tmp_path: Path) -> None:
    rng, read = random.Random(1), 0
    for _ in range(1000 * ROUNDS):
        name = rng.choice(NAMES)
        data = mutated(SEEDS[name], rng)
        path = tmp_path / "m.tersor"
        first, _ = readers(path, data)
        if first is not None and data != SEEDS[name]:
            read += 1
    # Changes that may go undetected: spaces after the header, case of letters in free text.
    assert read <= 10 * ROUNDS


def test_changed_text(tmp_path: Path) -> None:
    rng = random.Random(2)
    for _ in range(400 * ROUNDS):
        agree(tmp_path / "m.tersor", changed_text(SEEDS[rng.choice(NAMES)], rng))


def test_forged_text(tmp_path: Path) -> None:
    rng, read = random.Random(3), 0
    for _ in range(600 * ROUNDS):
        pieces = forged(take_apart(SEEDS[rng.choice(NAMES)]), rng)
        read += agree(tmp_path / "m.tersor", signed(pieces, rng))
    assert read >= 15 * ROUNDS  # some changes are valid; else only the digests were tested


needs_limits = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's limits")


@needs_limits
@pytest.mark.parametrize("files", [1000, pytest.param(50_000, marks=pytest.mark.long)])
def test_many_files(files: int, tmp_path: Path) -> None:
    """Run tests/fuzz.py, which reads in separate processes with limits of time and memory."""
    counts, found = fuzz.run(files, 4, tmp_path / "keep", say=lambda _: None)
    assert not found
    assert counts.total() == files
    assert {kind for kind in fuzz.KINDS if counts[f"{kind} refused"]} == set(fuzz.KINDS)
    assert {kind for kind in fuzz.KINDS[:2] if counts[f"{kind} read"]} == set(fuzz.KINDS[:2])


@needs_limits
@pytest.mark.parametrize("files", [1500, pytest.param(150_000, marks=pytest.mark.long)])
def test_many_other_inputs(files: int, tmp_path: Path) -> None:
    """Patches, safetensors files, pickles and recipes, likewise."""
    counts, found = fuzz.run(files, 4, tmp_path / "keep", say=lambda _: None, script=fuzz_inputs.__file__)
    assert not found
    assert counts.total() == files
    assert {f"{kind} refused" for kind in fuzz_inputs.KINDS} <= counts.keys()
    assert {f"{kind} read" for kind in ("safetensors", "pt", "recipe")} <= counts.keys()


@pytest.mark.long
@needs_limits
@pytest.mark.parametrize(
    "fault", ["raise KeyError(1)", "import os; os.abort()", "bytes(1 << 40)", "while True: pass"]
)
def test_each_kind_of_failure_is_detected(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that fails on one file of ten is detected; the file is kept, and the others are read."""
    script = (ROOT / "tests" / "fuzz.py").read_text()
    broken = script.replace(
        "    try:\n        loaded = load(path)",
        f"    if rng.random() < 0.1:\n        {fault}\n    try:\n        loaded = load(path)",
    ).replace("SECONDS = 10", "SECONDS = 2")
    assert broken != script
    copy = tmp_path / "fuzz.py"
    copy.write_text(
        broken.replace("from forge import", f"sys.path.insert(0, {str(ROOT / 'tests')!r})\nfrom forge import")
    )
    monkeypatch.setattr(fuzz, "__file__", str(copy))
    counts, found = fuzz.run(12, 5, tmp_path / "keep", say=lambda _: None)
    assert len(found) == counts["found"] == len(list((tmp_path / "keep").iterdir())) > 0


@pytest.mark.parametrize("name", NAMES)
def test_every_prefix_is_refused(name: str, tmp_path: Path) -> None:
    """No prefix of a file is a valid file."""
    data, path = SEEDS[name], tmp_path / "m.tersor"
    for length in {*range(0, len(data), 1 + len(data) // 80), len(data) - 1}:
        path.write_bytes(data[:length])
        with pytest.raises(FormatError):
            load(path)


@pytest.mark.parametrize("name", NAMES)
def test_every_flipped_byte_of_payload_is_detected(name: str, tmp_path: Path) -> None:
    """Each flip is detected or has no effect: deflate ignores up to 7 bits of the text's last byte."""
    data, path = SEEDS[name], tmp_path / "m.tersor"
    start, unseen = 4 if name.startswith("tiny") else 8 + int.from_bytes(data[:8], "little"), 0
    for at in range(start, len(data), 1 + (len(data) - start) // 150):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
        try:
            read = load(path)
        except FormatError:
            continue
        unseen += 1
        whole = load(GOLDEN / f"{name}.tersor")
        assert read.digest == whole.digest
        assert read.ledger.digest == whole.ledger.digest
        assert dict(read.sites) == dict(whole.sites)
    assert unseen <= 1
