"""A fork is like a process of its own: its words, folder, environment, output, exit code and end."""

import os
import signal
import time
from pathlib import Path

import forks
import pytest


def test_words_folder_environment_and_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "near.py").write_text("WORD = 'near'")
    code = "import os, sys, near; print(sys.argv, os.getcwd(), os.environ['A'], near.WORD); "
    code += "print(__name__, file=sys.stderr)"
    monkeypatch.chdir(tmp_path)
    done = forks.run(["-c", code, "b c", 3], env={"A": "a"})
    assert done.stdout == f"['-c', 'b c', '3'] {tmp_path} a near\n"
    assert (done.stderr, done.returncode) == ("__main__\n", 0)
    (tmp_path / "file.py").write_text("import sys; print(sys.argv, __file__)")
    assert forks.run(["file.py", "x"]).stdout == "['file.py', 'x'] file.py\n"
    assert (
        forks.run(["-m", "file", "x"]).stdout
        == f"{[str(tmp_path / 'file.py'), 'x']} {tmp_path / 'file.py'}\n"
    )


def test_no_fork_sees_what_another_did() -> None:
    code = (
        "import sys, builtins; print(getattr(builtins, 'mark', 0), 'tests' in sys.modules); builtins.mark = 1"
    )
    assert {forks.run(["-c", code]).stdout for _ in range(2)} == {"0 False\n"}


@pytest.mark.parametrize(
    ("code", "wanted", "said"),
    [
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit('why')", 1, "why\n"),
        ("raise SystemExit", 0, ""),
        ("1 / 0", 1, "ZeroDivisionError"),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL, ""),
        ("import atexit, sys; atexit.register(lambda: print('bye', file=sys.stderr))", 0, "bye\n"),
    ],
)
def test_exit_codes(code: str, wanted: int, said: str) -> None:
    done = forks.run(["-c", code])
    assert done.returncode == wanted
    assert said in done.stderr
    assert bool(done.stderr) == bool(said)


def test_output_that_nobody_reads_is_an_error_at_the_end() -> None:
    """As of an interpreter: what print has buffered is written when it ends."""
    reading, writing = os.pipe()
    os.close(reading)
    done = forks.run(["-c", "print(1)"], stdout=writing)
    os.close(writing)
    assert done.returncode == 120
    assert "BrokenPipeError" in done.stderr


def test_it_can_be_watched_and_killed() -> None:
    child = forks.start(["-c", "import time; print('on', flush=True); time.sleep(600)"])
    until = time.monotonic() + 60
    while child.read()[0] != "on\n" and time.monotonic() < until:
        time.sleep(0.01)
    assert child.poll() is None
    assert child.kill() == child.poll() == -signal.SIGKILL
    assert child.read() == ("on\n", "")


def test_one_has_imported_the_package_and_one_has_not() -> None:
    code = "import sys; print('tersor' in sys.modules, 'torch' in sys.modules, 'numba' in sys.modules)"
    assert forks.run(["-c", code]).stdout == "True True True\n"
    assert forks.run(["-c", code], of="numba").stdout == "False False True\n"
