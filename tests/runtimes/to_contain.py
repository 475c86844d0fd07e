"""Functions for a child process, in a module that it can import: crashes, hangs, errors, results."""

import ctypes
import importlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from tersor.errors import FormatError
from tersor.runtimes import RUNTIMES


def doubled(array: np.ndarray) -> np.ndarray:
    return 2 * array


def aborts(*_: Any) -> None:
    os.write(2, b"first line\nfree(): invalid pointer\n\n")
    os.abort()


def segfaults() -> None:
    ctypes.string_at(0)


def killed() -> None:  # as by a system that runs out of memory
    os.kill(os.getpid(), signal.SIGKILL)


def leaves() -> None:
    os._exit(3)


def hangs(noted: Path) -> None:
    noted.write_text(str(os.getpid()))
    time.sleep(600)


def refuses() -> None:
    raise FormatError("file: no model")


def fails() -> None:
    raise ValueError("of another kind")


def prints() -> str:
    print("python")
    os.write(1, b"native\n")
    return "result"


def loaded(runtime: str, packages: set[str]) -> list[str]:
    """Which of these packages the part of a runtime that loads files has imported."""
    importlib.import_module(RUNTIMES[runtime].session)
    return sorted(packages & sys.modules.keys())
