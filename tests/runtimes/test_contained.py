"""Contained: a child's crash or hang is an error here, and nothing else passes between the two."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import to_contain

from tersor.errors import FormatError, RefusedError, SettingError
from tersor.runtimes import agree
from tersor.runtimes.contained import contained


def test_a_result_comes_back() -> None:
    array = np.arange(300_000.0).reshape(3, -1)  # more than a pipe holds
    assert np.array_equal(contained(to_contain.doubled, array, who="test"), 2 * array)


def test_what_is_printed_is_no_part_of_the_result(capfd: pytest.CaptureFixture[str]) -> None:
    assert contained(to_contain.prints, who="test") == "result"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (to_contain.aborts, r"test: its process ended with signal SIGABRT: free\(\): invalid pointer$"),
        (to_contain.segfaults, "signal SIGSEGV"),
        (to_contain.killed, "signal SIGKILL$"),
        (to_contain.leaves, "exit code 3$"),
        (to_contain.fails, "exit code 1: ValueError: of another kind$"),
    ],
)
def test_other_endings_are_refusals(function: Any, says: str) -> None:
    with pytest.raises(RefusedError, match=says):
        contained(function, who="test")


def test_errors_for_users_pass() -> None:
    with pytest.raises(FormatError, match=r"^file: no model$"):
        contained(to_contain.refuses, who="test")


@pytest.mark.wide
def test_a_child_that_hangs_is_ended(tmp_path: Path) -> None:
    begin, noted = time.monotonic(), tmp_path / "pid"
    with pytest.raises(RefusedError, match="test: no result after 3 s; its process was ended"):
        contained(to_contain.hangs, noted, who="test", timeout_s=3)
    assert time.monotonic() - begin < 60
    with pytest.raises(ProcessLookupError):
        os.kill(int(noted.read_text()), 0)


def test_only_functions_that_a_child_can_import() -> None:
    for function in (lambda: 1, test_a_result_comes_back.__init__):
        with pytest.raises(SettingError, match="is no function of a module that can be imported"):
            contained(function, who="test")


def test_the_script_of_the_user_is_not_run_again(tmp_path: Path) -> None:
    """As multiprocessing does. It has no guard of __main__, and an import that only it can find."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "beside.py").write_text("def seven(): return 7\n")
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(tmp_path / 'own')!r})\n"
        "import beside\n"
        "from tersor.runtimes.contained import contained\n"
        "print('once', contained(beside.seven, who='test'))\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert done.stdout == "once 7\n"


@pytest.mark.parametrize("module", ["onnxruntime"])
def test_a_child_is_light(module: str) -> None:
    assert contained(to_contain.loaded, module, {"torch", "onnx", "numpy", "numba"}, who="test") == ["numpy"]


def test_a_first_run_is_contained_and_a_later_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import qdq
    import torch

    path, batch = qdq.network(tmp_path / "m.onnx"), torch.from_numpy(qdq.inputs(2))
    monkeypatch.setattr(agree, "first_run", to_contain.aborts)
    with pytest.raises(RefusedError, match=r"^onnxruntime: ONNX Runtime cannot run m\.onnx: .* SIGABRT"):
        agree.compared("onnxruntime", torch.nn.Identity(), path, [batch], None, first=True)
    with pytest.raises(RefusedError, match="compare: torch gives outputs of"):
        agree.compared("onnxruntime", torch.nn.Identity(), path, [batch], None)
