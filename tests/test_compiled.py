"""Compiled loops: where their code is kept, when it is compiled anew, and who is told."""

import os
import shutil
import stat
import subprocess
from pathlib import Path

import forks
import pytest

from tersor import compiled
from tersor.compiled import (
    begin,
    digest,
    keep_in,
    loop_modules,
    loops_of,
    ours,
    tidy,
    usable,
    wait_for,
)

MODULE = "tersor.coders.bit_strings_loops"  # the least to compile
SAY = "import logging, sys; logging.basicConfig(stream=sys.stdout, format='%(message)s')\n"
CODE = f"""{SAY}
import numpy as np
from tersor.coders.bit_strings import BitReader, BitWriter, read_list, write_list
out = BitWriter()
write_list(out, np.arange(40))
print(read_list(BitReader(memoryview(out.to_bytes())), 40, 99).tolist() == list(range(40)))
from tersor.compiled import folder
print(folder())
"""


def python(code: str, root: Path | None = None, **environment: str) -> list[str]:
    """The lines that a process prints that has not imported the package, with the one below `root`."""
    known = {key: value for key, value in os.environ.items() if key != "NUMBA_CACHE_DIR"}
    if root is not None:
        known["PYTHONPATH"] = str(root)
    done = forks.run(["-c", code], env=known | environment, of="numba", check=True)
    return list(done.stdout.splitlines())


def test_the_first_process_compiles_and_says_so_and_the_second_does_not(tmp_path: Path) -> None:
    first, second = (python(CODE, NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(2))
    assert first == [compiled.WAITING, "True", str(tmp_path / f"loops-{digest()}")]
    assert second == first[1:]


def test_the_code_of_each_loop_is_its_own(tmp_path: Path) -> None:
    """Loops whose name is the end of another's: slots_of and narrow_slots_of had removed each other's code,
    so that every process compiled both."""
    lines = (
        "from tersor.coders.rans.tables_loops import narrow_slots_of, slots_of",
        "found = [loop.compile() and [f.name for f in loop.files(folder())] for loop in (narrow_slots_of, "
        "slots_of)]",
        "print(not set(found[0]) & set(found[1]), min(map(len, found)) > 1)",
    )
    code = "\n".join((SAY, "from tersor.compiled import folder", *lines))
    first, second = (python(code, NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(2))
    assert first == [compiled.WAITING, "True True"]
    assert second == ["True True"]


DAMAGE = {
    "emptied": lambda data: b"",
    "cut": lambda data: data[:100],
    "one byte": lambda data: (
        data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
    ),
}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A cache with the code of one loop, and what the process that made it printed."""
    folder = tmp_path_factory.mktemp("kept") / "cache"
    return folder, python(CODE, NUMBA_CACHE_DIR=str(folder))


@pytest.mark.sampled(damage=("cut", "one byte"))
@pytest.mark.parametrize(
    ("damage", "kind", "marks"),
    [("emptied", "nbi", True), ("emptied", "nbc", False), ("cut", "nbi", False), ("cut", "nbc", True),
     ("one byte", "nbc", True)],
)  # fmt: skip
def test_damaged_code_is_removed_and_compiled_again(
    damage: str, kind: str, marks: bool, tmp_path: Path, kept: tuple[Path, list[str]]
) -> None:
    """Without its mark a file is only known to be damaged when it cannot be loaded."""
    folder = shutil.copytree(kept[0], tmp_path / "cache")
    for path in folder.rglob(f"*.{kind}"):
        path.write_bytes(DAMAGE[damage](path.read_bytes()))
    for path in () if marks else folder.glob("loops-*/tersor.*"):
        path.unlink()
    (name,) = folder.glob("loops-*")
    assert python(CODE, NUMBA_CACHE_DIR=str(folder)) == [compiled.WAITING, "True", str(name)]
    assert python(CODE, NUMBA_CACHE_DIR=str(folder)) == ["True", str(name)]


@pytest.mark.wide
@pytest.mark.skipif(not hasattr(os, "fork"), reason="limits of POSIX")
def test_a_full_disk_keeps_nothing_and_stops_nothing(tmp_path: Path) -> None:
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))\n"
    full = python(limit + CODE, NUMBA_CACHE_DIR=str(tmp_path))
    assert full[:2] == [compiled.WAITING, "True"]
    assert python(CODE, NUMBA_CACHE_DIR=str(tmp_path)) == full
    assert python(CODE, NUMBA_CACHE_DIR=str(tmp_path)) == full[1:]


def copied(tmp_path: Path) -> Path:
    """The package, copied: its root."""
    shutil.copytree(compiled.HERE, tmp_path / "lib" / "tersor", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "lib"


def test_a_change_of_another_source_compiles_anew(tmp_path: Path) -> None:
    """What other loops call is compiled into them: they depend on its file too."""
    root = copied(tmp_path)
    first = python(CODE, root)
    assert python(CODE, root) == first[1:]
    path = root / "tersor" / "coders" / "vector_loops.py"
    path.write_text(path.read_text() + "\n# changed\n")
    changed = python(CODE, root)
    assert changed[0] == compiled.WAITING
    assert changed[-1] != first[-1]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.name == "nt", reason="permissions of POSIX")
def test_a_read_only_installation_keeps_its_code_in_the_users_cache(tmp_path: Path) -> None:
    root = copied(tmp_path)
    (root / "tersor" / "__pycache__").write_text("")  # no folder can be made there, by root neither
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
    first, second = (python(CODE, root, **cache) for _ in range(2))
    assert first[0] == compiled.WAITING
    assert Path(first[-1]).parent == tmp_path / "cache" / "tersor"
    assert second == first[1:]


@pytest.mark.wide
@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions of POSIX")
def test_without_any_cache_folder_of_ones_own_the_temporary_one_serves(tmp_path: Path) -> None:
    root = copied(tmp_path)
    (root / "tersor" / "__pycache__").write_text("")
    (tmp_path / "file").write_text("")
    (tmp_path / "t").mkdir()
    there = {
        "XDG_CACHE_HOME": str(tmp_path / "file"), "TMPDIR": str(tmp_path / "t"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    first, second = (python(CODE, root, **there) for _ in range(2))
    assert Path(first[-1]).parent == tmp_path / "t" / f"tersor-{os.getuid()}"
    assert second == first[1:]
    (private,) = (tmp_path / "t").iterdir()
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    private.chmod(0o777)  # anybody could have put code there: nothing is loaded from it
    assert python(CODE, root, **there) == [compiled.WAITING, "True", "None"]


def test_a_link_or_a_folder_of_others_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "own")
    assert ours(tmp_path / "own")
    assert not ours(tmp_path / "link")
    (tmp_path / "own").chmod(0o770)
    assert not ours(tmp_path / "own")
    assert not usable(tmp_path / "own" / "loops", private=True)
    assert usable(tmp_path / "own" / "loops", private=False)


def test_folders_of_other_sources_go_after_a_month(tmp_path: Path) -> None:
    for name in ("loops-old", "loops-new", "loops-mine", "loops-bare", "else"):
        (tmp_path / name).mkdir()
        if name != "loops-bare":
            (tmp_path / name / "used").touch()
    os.utime(tmp_path / "loops-old" / "used", (0, 0))
    os.utime(tmp_path / "loops-mine" / "used", (0, 0))
    tidy(tmp_path / "loops-mine")
    assert {path.name for path in tmp_path.iterdir()} == {"loops-new", "loops-mine", "loops-bare", "else"}


@pytest.mark.parametrize("fails", [False, True])
def test_numba_is_left_as_it_was(fails: bool, tmp_path: Path) -> None:
    from numba import config

    before, seen = config.CACHE_DIR, []

    class Dispatcher:
        def enable_caching(self) -> None:
            seen.append(config.CACHE_DIR)
            if fails:
                raise RuntimeError

    keep_in(tmp_path, Dispatcher())
    assert seen == [str(tmp_path)]
    assert before == config.CACHE_DIR


def test_a_process_beside_compiles_and_is_waited_for(tmp_path: Path) -> None:
    code = f"""{SAY}
import os, tersor.compiled as c
os.cpu_count = lambda: 2
c.begin([{MODULE!r}]); c.begin([{MODULE!r}])
print(len(set(map(id, c.beside.values()))))
c.wait_for({MODULE!r})
print((c.folder() / {MODULE!r}).exists(), c.beside)
loops = list(c.loops_of({MODULE!r}))
for loop in loops:
    loop.compile()
stats = [(s.cache_hits, s.cache_misses) for s in (loop.dispatcher.stats for loop in loops)]
hits, misses = (sum(sum(s[k].values()) for s in stats) for k in (0, 1))
print(hits == len(loops), misses)
c.begin([{MODULE!r}])
print(c.beside)
"""
    said = python(code, NUMBA_CACHE_DIR=str(tmp_path))
    assert [line for line in said if line != compiled.WAITING] == ["1", "True {}", "True 0", "{}"]


def test_a_process_beside_that_fails_is_no_matter(tmp_path: Path) -> None:
    code = f"""{SAY}
import os, sys, tersor.compiled as c
os.cpu_count = lambda: 2
sys.executable = {str(tmp_path / "false")!r}
c.begin([{MODULE!r}])
{CODE}"""
    (tmp_path / "false").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "false").chmod(0o755)
    assert "True" in python(code, NUMBA_CACHE_DIR=str(tmp_path / "cache"))


def test_one_core_compiles_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    begin(["a.module.that.is.not.there"])
    wait_for("a.module.that.is.not.there")


@pytest.mark.parametrize("module", loop_modules())
def test_every_loop_of_a_module_is_compiled_in_one_way(module: str) -> None:
    """`compiled` is the only way to a loop that Python calls: its code is under the hash of the sources."""
    path = compiled.HERE.parent.joinpath(*module.split(".")).with_suffix(".py")
    assert len(list(loops_of(module))) == path.read_text().count("\n@compiled(")
    assert "cache=" not in path.read_text()


@pytest.mark.wide
@pytest.mark.parametrize("program", ["no/such/python", ""])
def test_a_process_beside_that_cannot_start_is_no_matter(program: str, tmp_path: Path) -> None:
    code = f"{SAY}\nimport os, sys, tersor.compiled as c\nos.cpu_count = lambda: 2\n"
    code += f"sys.executable = {program!r}\n"
    assert "True" in python(f"{code}c.begin([{MODULE!r}])\n{CODE}", NUMBA_CACHE_DIR=str(tmp_path))


def test_a_process_beside_imports_nothing_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("numba", "queue", "tersor"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    code = f"""import os, sys
sys.path.remove("")
import tersor.compiled as c
os.cpu_count = lambda: 2
c.begin([{MODULE!r}]); c.wait_for({MODULE!r})
print((c.folder() / {MODULE!r}).exists())
"""
    monkeypatch.chdir(tmp_path)
    root = str(compiled.HERE.parent)
    assert python(code, Path(root), NUMBA_CACHE_DIR=str(tmp_path / "cache"))[-1] == "True"
    assert not (tmp_path / "ran").exists()


def test_from_a_zip_nothing_is_kept(tmp_path: Path) -> None:
    """Its sources are no files, so nothing would tell when the code is stale."""
    root = copied(tmp_path)
    shutil.make_archive(str(tmp_path / "t"), "zip", root)
    said = python(CODE, tmp_path / "t.zip", NUMBA_CACHE_DIR=str(tmp_path / "cache"))
    assert said == [compiled.WAITING, "True", "None"]
    assert not list(tmp_path.glob("cache/*"))
