"""Safety: a file uses only the memory that its limits allow; a failure leaves the earlier file complete."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forge import ROOT, constant, constant_bytes, floats, one_site, plain

from tersor.core.state import State
from tersor.errors import FormatError, StorageError
from tersor.forms import Dense
from tersor.io.container import load
from tersor.io.container_writer import save
from tersor.io.validate import limit_for
from tersor.model.sites import Site
from tersor.record.ledger import Ledger

GOLDEN = ROOT / "tests" / "golden"
MB = 1 << 20
SIDE = 1200

# Reads files one after the other and prints the peak memory of each.
MEASURE = """
import sys
import torch, tersor.coders
from tersor.errors import FormatError
from tersor.io.container import TersorFile, load

def status(key):
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

torch.set_num_threads(1)
for number, path in enumerate([sys.argv[1], *sys.argv[1:]]):
    open("/proc/self/clear_refs", "w").write("5")  # resets the peak
    before = status("VmRSS")
    try:
        load(path)
    except FormatError:
        pass
    if number:
        print(path, status("VmHWM") - before)
"""
needs_proc = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc/self/clear_refs"
)


def claims() -> Iterator[tuple[str, bytes, int]]:
    """Files of a few hundred bytes that claim many elements: name, bytes, elements of all nodes."""
    shape, n, many = [SIDE, SIDE], SIDE * SIDE, [SIDE, SIDE, SIDE]
    double, codes = constant(shape, "float64", 8), constant(shape, "int16", 2)
    zero, one = constant(shape, "int64", 8), constant_bytes
    affine = {"form": "affine", "codes": codes, "scale": double, "zero": zero, "group": 1}
    log = {"form": "loggrid", "codes": constant(shape, "int8"), "scale": double, "group": 1, "axis": 1}
    book = {"form": "codebook", "index": codes, "book": plain("float32", [2])}
    kept = constant(shape, "float32", 4, kept=True)
    masked = {"form": "masked", "keep": constant(shape, "bool"), "body": kept}
    yield "plain", one_site(constant(shape), shape, one(1), dtype="uint8").sign().bytes(), n
    yield "affine", one_site(affine, shape, one(0, 18)).sign().bytes(), 4 * n
    yield "log", one_site(log, shape, one(0, 9)).sign().bytes(), 3 * n
    yield "book", one_site(book, shape, one(0, 2) + floats(1, 2)).sign().bytes(), 2 * n + 2
    yield "masked", one_site(masked, shape, one(1) + one(0, 4)).sign().bytes(), 3 * n
    yield "refused", one_site(constant(many), many, one(1), dtype="uint8").sign().bytes(), 0


@needs_proc
def test_memory_is_what_the_header_justifies(tmp_path: Path) -> None:
    """At most 24 bytes per counted element, and none for a refused file."""
    rooms = {}
    for name, data, elements in claims():
        (tmp_path / name).write_bytes(data)
        rooms[str(tmp_path / name)] = 24 * elements
    bombs = ("cut-bomb", "cut-bombs", "grid-claim", "grid-claim-long", "attachment-bomb", "attachment-free")
    for name in ("claim-constant", "claim-product", "claim-overflow", "text-bomb", "header-nested", *bombs):
        rooms[str(GOLDEN / "refused" / f"{name}.tersor")] = 0
    done = subprocess.run([sys.executable, "-c", MEASURE, *rooms], capture_output=True, text=True, check=True)
    used = {line.rsplit(" ", 1)[0]: int(line.rsplit(" ", 1)[1]) for line in done.stdout.splitlines()}
    assert used.keys() == rooms.keys()
    assert {name: nbytes for name, nbytes in used.items() if nbytes > rooms[name] + 8 * MB} == {}
    assert used[str(tmp_path / "affine")] > 8 * SIDE * SIDE  # else nothing was measured


def test_limit_is_the_callers_to_raise(tmp_path: Path) -> None:
    shape = [5000, 5000]
    path = tmp_path / "m.tersor"
    data = one_site(constant(shape), shape, constant_bytes(7), dtype="uint8").sign().bytes()
    path.write_bytes(data)
    with pytest.raises(
        FormatError, match="declares 25,000,000 elements, but its [0-9,]+ bytes justify 1[67],"
    ):
        load(path)
    loaded = load(path, limit=25_000_000)
    assert int(loaded.state_dict()["w"].sum(dtype=torch.int64)) == 7 * 25_000_000
    with pytest.raises(FormatError, match="raise the limit"):
        load(path, limit=24_999_999)


def test_limit_counts_every_node_of_every_site(tmp_path: Path) -> None:
    path = tmp_path / "m.tersor"
    forms = {name: Dense(torch.ones(5, 3)) for name in "ab"}
    sites = {name: Site(name, (5, 3), "float32", "linear") for name in "ab"}
    save(State(sites, forms, {}, Ledger("", {})), path)
    load(path, limit=30)
    with pytest.raises(FormatError, match="b: with it the file declares 30 elements"):
        load(path, limit=29)
    assert limit_for(1000) == 16_777_216 + 1_024_000


# --- the earlier file is kept ---


def result(seed: int, size: int = 3000) -> State:
    values = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    return State({"w": Site("w", (size,), "float32", "linear")}, {"w": Dense(values)}, {}, Ledger("", {}))


def test_full_disk_by_every_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever write fails, the earlier file is complete and no other file is left."""
    path = tmp_path / "m.tersor"
    save(result(1), path)
    earlier, counted = path.read_bytes(), 0

    class Full:
        """A file on a disk that is full after some writes."""

        def __init__(self, file: Any, room: int) -> None:
            self.file, self.room = file, room

        def write(self, data: bytes) -> int:
            nonlocal counted
            counted += 1
            if self.room == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.room -= 1
            return int(self.file.write(data))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

    real = open
    for room in range(100):
        monkeypatch.setattr("builtins.open", lambda *args, room=room, **more: Full(real(*args, **more), room))
        try:
            save(result(2), path)
        except StorageError as error:
            monkeypatch.undo()
            assert "cannot be written: No space left on device; the earlier file is as it was" in str(error)  # noqa: PT017
            assert path.read_bytes() == earlier
            assert list(tmp_path.iterdir()) == [path]
            continue
        monkeypatch.undo()
        break
    assert load(path).digest == result(2).digest
    assert counted > 3


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("mounting a small disk needs root and a system that lets it")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_full_disk(tiny_disk: Path) -> None:
    path = tiny_disk / "m.tersor"
    save(result(1), path)
    with pytest.raises(StorageError, match="No space left on device; the earlier file is as it was"):
        save(result(2, 400_000), path)
    assert load(path).digest == result(1).digest
    assert list(tiny_disk.iterdir()) == [path]


def test_killed_while_saving(tmp_path: Path) -> None:
    """After a kill at any moment, the file is one of the complete ones."""
    path = tmp_path / "m.tersor"
    results = [result(seed, 300_000) for seed in (0, 1)]
    whole = {one.digest for one in results}
    save(results[0], path)
    first = path.stat().st_ino
    replaced = 0
    for delay in (0.002, 0.004, 0.008, 0.012, 0.016, 0.02, 0.03, 0.04, 0.1, 0.2, 0.5, 1.0):
        child = os.fork()
        if child == 0:  # saves two states in turn until it is killed
            try:
                for turn in range(10**6):
                    save(results[turn % 2], path)
            finally:
                os._exit(1)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        assert load(path).digest in whole
        replaced += path.stat().st_ino != first
    assert replaced  # else no child got as far as moving a file into place


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        save(result(1), tmp_path / "file" / "m.tersor")
