"""Contained: run a function in a child process, so that a crash or a hang in it does not take this one along.

For a file that a runtime loads for the first time: native code may end its process or never return.
Not multiprocessing: it runs the user's script anew in the child, torch included. A child that imports numpy
and a runtime takes 0.1 to 0.5 s (child.py), some 50 MB, and copies of arguments and result.
"""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tersor.errors import RefusedError, SettingError, TersorError

CHILD = Path(__file__).with_name("child.py")
TIMEOUT_S = 600.0  # for a first load and run; the slowest models compile for a minute or two

Result = TypeVar("Result")


def contained(
    function: Callable[..., Result], *args: object, who: str, timeout_s: float = TIMEOUT_S
) -> Result:
    """function(*args) in a child process.

    `function` is a function of a module that can be imported; arguments and result are pickled. Its module
    should not import torch, or the child takes seconds. `who` begins the messages. An error of tersor.errors
    is raised here, too. RefusedError if the process ends in another way, or is not done after `timeout_s`
    seconds.
    """
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    if module in (None, "__main__") or "." in name or "<" in name:
        raise SettingError(f"contained: {module}.{name} is no function of a module that can be imported")
    where = sys.path, str(CHILD.parent.parent)
    parts = (pickle.dumps(part, pickle.HIGHEST_PROTOCOL) for part in (where, (module, name, args)))
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(CHILD)],
            input=b"".join(parts), capture_output=True, timeout=timeout_s, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise RefusedError(f"{who}: no result after {timeout_s:g} s; its process was ended") from None
    if done.returncode:
        raise RefusedError(f"{who}: its process ended with {ending(done.returncode)}{last_line(done.stderr)}")
    ok, answer = pickle.loads(done.stdout)
    if not ok and isinstance(answer, TersorError):
        raise answer
    result: Result = answer
    return result


def ending(code: int) -> str:
    """How a process ended: "signal SIGSEGV" or "exit code 3"."""
    known = {-int(item): item.name for item in signal.Signals}
    return f"signal {known.get(code, -code)}" if code < 0 else f"exit code {code}"


def last_line(stderr: bytes) -> str:
    """The last line that a process printed, to follow a message: a traceback ends with its error."""
    lines = [line for line in stderr.decode(errors="replace").splitlines() if line.strip()]
    return f": {lines[-1].strip()[:300]}" if lines else ""
