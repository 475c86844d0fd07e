"""kill -9 at any moment: the earlier file is kept, and no incomplete file replaces it."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tersor.core.recipe import Recipe
from tersor.errors import StorageError
from tersor.files import atomic, atomic_folder
from tersor.io.pack import pack
from tersor.io.unpack import unpack
from tersor.steps import Entropy

LOSSLESS = Recipe((Entropy(),))
MOMENTS = 20
GONE = 2**22 + 1  # no process has this id: the limit of Linux is 2^22

# For each line "JOB GIVEN OUT" a process repeats the job until it is killed.
SERVER = """
import itertools, os, sys, tempfile
import tersor.coders
from tersor.core.recipe import Recipe
from tersor.io.pack import pack
from tersor.io.unpack import unpack
from tersor.steps import Entropy

def work(job, first, second, out, turns):
    for turn in turns:
        given = (first, second)[turn % 2]
        if job == "pack":
            pack(given, out, Recipe((Entropy(),)))
        else:
            unpack(given, out)

warm = set()
for line in sys.stdin:
    words = line.split()
    if words[0] not in warm:  # what is compiled is compiled once, not in each child
        with tempfile.TemporaryDirectory() as folder:
            work(*words[:3], folder + "/out.safetensors", range(1))
        warm.add(words[0])
    child = os.fork()
    if not child:
        work(*words, itertools.count())
    print(child, flush=True)
    os.waitpid(child, 0)
"""


def write_weights(folder: Path, seeds: range, size: int = 100) -> list[Path]:
    """Different checkpoints, and their packed files beside them."""
    paths = []
    for seed in seeds:
        rng = torch.Generator().manual_seed(seed)
        given = {f"layer{n}.weight": torch.randn(size, size, generator=rng) for n in range(4)}
        paths.append(folder / f"{seed}.safetensors")
        save_file(given, paths[-1])
        pack(paths[-1], folder / f"{seed}.tersor", LOSSLESS)
    return paths


def read_all(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen[str]]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.stdin.close()  # type: ignore[union-attr]


def kill_after(server: subprocess.Popen[str], words: list[str], seconds: float) -> None:
    """Let a process do the job for some time, then kill it."""
    server.stdin.write(" ".join(words) + "\n")  # type: ignore[union-attr]
    server.stdin.flush()  # type: ignore[union-attr]
    child = int(server.stdout.readline())  # type: ignore[union-attr]
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)


@pytest.mark.wide
@pytest.mark.parametrize("job", ["pack", "unpack"])
def test_killed_at_random_moments(job: str, tmp_path: Path, server: subprocess.Popen[str]) -> None:
    weights = write_weights(tmp_path, range(2))
    given = weights if job == "pack" else [path.with_suffix(".tersor") for path in weights]
    folder = tmp_path / "out"
    folder.mkdir()
    out, whole = folder / ("o.tersor" if job == "pack" else "o.safetensors"), []
    for path in given:
        pack(path, out, LOSSLESS) if job == "pack" else unpack(path, out)
        whole.append(out.read_bytes())
    assert whole[0] != whole[1]
    rng, found = random.Random(1), set()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    longest = 0.25
    for moment in range(3 * MOMENTS):
        kill_after(server, [job, *map(str, given), str(out)], rng.uniform(0.0, longest))
        found.add(whole.index(out.read_bytes()))  # ValueError: the file is neither of the two
        if moment >= MOMENTS - 1:
            if found == {0, 1}:
                break
            longest *= 1.2  # a busy machine takes longer to put the first file in place
    assert found == {0, 1}  # else no process got as far as moving a file into place
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    until = time.monotonic() + 10
    while len(list(folder.iterdir())) > 1 and time.monotonic() < until:  # wait for the last one to end
        with atomic(out) as file:
            file.write(b"")
    assert list(folder.iterdir()) == [out]


@pytest.mark.long
@pytest.mark.parametrize("job", ["pack", "unpack", "unpack --shard 400kB"])
def test_command_killed_at_random_moments(job: str, tmp_path: Path) -> None:
    """The same with the command line: killed at any moment from start to end."""
    (old,), (new,) = write_weights(tmp_path, range(1)), write_weights(tmp_path, range(1, 2))
    suffix = ".safetensors" if job == "pack" else ".tersor"
    target = {"pack": "out/o.tersor", "unpack": "out/o.safetensors"}.get(job, "out/o")
    line = [sys.executable, "-m", "tersor", *job.split(), "--quiet", "-o", str(tmp_path / target)]
    folder, out = tmp_path / "out", tmp_path / target

    def state() -> object:
        return read_all(out) if out.is_dir() else out.read_bytes() if out.exists() else None

    def start(given: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*line, str(given.with_suffix(suffix))], stdout=subprocess.DEVNULL)

    began = time.monotonic()
    if "shard" not in job:  # a folder must not exist yet
        assert start(old).wait() == 0
    first, before = state(), {path.name: path.read_bytes() for path in tmp_path.glob("*.*")}
    process = start(new)
    assert process.wait() == 0
    took, second = time.monotonic() - began, state()
    took /= 1 if "shard" in job else 2
    rng, seen = random.Random(2), []
    for moment in range(MOMENTS):
        if "shard" in job:
            for path in folder.glob("o/*"):
                path.unlink()
            if out.exists():
                out.rmdir()
        elif first != state():
            assert start(old).wait() == 0
        process = start(new)
        # The second half of the moments are after the imports, where files are written.
        time.sleep(took * rng.uniform(*((0.0, 1.0) if moment % 2 else (0.7, 1.0))))
        process.kill()
        process.wait()
        seen.append(state())
        assert seen[-1] in (first, second)
        assert {path.name: path.read_bytes() for path in tmp_path.glob("*.*")} == before
    assert first in seen
    if "shard" not in job:
        assert start(old).wait() == 0
        assert list(folder.iterdir()) == [out]


# --- leftovers, and nothing else, are removed ---


@pytest.fixture(params=["nameless", "named", "nameless for good"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Three systems: with unnamed temporary files, without them, and where one cannot be linked to a name."""
    if not hasattr(os, "O_TMPFILE") and request.param != "named":
        pytest.skip("this system has no files without a name")
    if request.param == "named":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    if request.param == "nameless for good":

        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
    return str(request.param)


def test_written_in_each_system(system: str, tmp_path: Path) -> None:
    """A new file has the permissions of the umask; a rewritten file keeps its permissions."""
    path, new = tmp_path / "a", tmp_path / "new"
    path.write_bytes(b"old")
    path.chmod(0o604)
    umask = os.umask(0o027)
    try:
        with atomic(path) as file:
            file.write(b"new" * 1000)
            during = sorted(entry.name for entry in tmp_path.iterdir())
            assert os.fstat(file.fileno()).st_mode & 0o777 == 0o604, "from its first byte on"
            assert path.read_bytes() == b"old"
        with atomic(new) as file:
            file.write(b"new")
    finally:
        os.umask(umask)
    assert during == (["a"] if "nameless" in system else [f".a.{os.getpid()}.part", "a"])
    assert path.read_bytes() == b"new" * 1000
    assert path.stat().st_mode & 0o777 == 0o604
    assert new.stat().st_mode & 0o777 == 0o640
    assert sorted(tmp_path.iterdir()) == [path, new]


def test_an_error_leaves_nothing(system: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def write() -> None:
        with atomic(path) as file:
            file.write(b"new")
            raise KeyError

    with pytest.raises(KeyError):
        write()
    assert read_all(tmp_path) == {"a": b"old"}


def test_leftovers_of_dead_processes_are_removed(tmp_path: Path) -> None:
    folder = tmp_path / f".a.{GONE}.part"
    folder.mkdir()
    (folder / "x").write_bytes(b"")
    (tmp_path / f".a.{GONE + 1}.part").write_bytes(b"half")
    kept = {f".a.{os.getppid()}.part", f".b.{GONE}.part", ".a.x.part", f"a.{GONE}.part", f".a.{GONE}.part.b"}
    for name in kept:
        (tmp_path / name).write_bytes(b"")
    with atomic(tmp_path / "a") as file:
        file.write(b"new")
    assert set(read_all(tmp_path)) == kept | {"a"}


def test_names_with_glob_characters(tmp_path: Path) -> None:
    (tmp_path / f".[a]*.{GONE}.part").write_bytes(b"")
    (tmp_path / f".ab.{GONE}.part").write_bytes(b"")
    with atomic(tmp_path / "[a]*"):
        pass
    assert set(read_all(tmp_path)) == {"[a]*", f".ab.{GONE}.part"}


def test_locked_files_are_left_alone(tmp_path: Path) -> None:
    """The process id of another machine may be unused here; its lock is respected."""
    fcntl = pytest.importorskip("fcntl")
    left = tmp_path / f".a.{GONE}.part"
    with left.open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with atomic(tmp_path / "a"):
            pass
        assert left.exists()
    with atomic(tmp_path / "a"):
        pass
    assert not left.exists()


def test_folder_appears_complete(tmp_path: Path) -> None:
    path = tmp_path / "f"
    (tmp_path / f".f.{GONE}.part").mkdir()
    with atomic_folder(path) as folder:
        (folder / "x").write_bytes(b"1")
        assert not path.exists()
        assert {entry.name for entry in tmp_path.iterdir()} == {folder.name}
    assert read_all(path) == {"x": b"1"}
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(StorageError, match="exists already"), atomic_folder(path):
        pass
    assert read_all(path) == {"x": b"1"}


def test_folder_of_an_error_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.mkdir()  # an empty folder may exist

    def write() -> None:
        with atomic_folder(path) as folder:
            (folder / "x").write_bytes(b"1")
            raise KeyError

    with pytest.raises(KeyError):
        write()
    assert list(tmp_path.iterdir()) == [path]
    assert not any(path.iterdir())
