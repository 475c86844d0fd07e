"""Sessions: a file that a runtime has loaded, ready to run. What all runtimes share.

session.run(*arrays, **named) -> [output, ...]      arrays or tensors in the file's order, or by name
Nothing here imports torch: a child process that runs a file once is ready in half a second.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np

from tersor.errors import SettingError, StorageError
from tersor.runtimes import MOST_THREADS, RUNTIMES

Feed = tuple[list[np.ndarray], dict[str, np.ndarray]]  # inputs in order, and by name


class Session(ABC):
    """A loaded model. `inputs` and `outputs` are the names, in order."""

    broken: tuple[type[Exception], ...]  # what the runtime raises for inputs that do not fit

    def __init__(self, path: Path, inputs: list[str], outputs: list[str], batch: int | None = None):
        """`batch`: the fixed size of axis 0 of the first input; None for any size."""
        self.path, self.inputs, self.outputs, self.batch = path, inputs, outputs, batch

    def why(self, error: Exception) -> str:
        """Such an error in one line."""
        return brief(error)

    @abstractmethod
    def call(self, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        """All outputs, for one array for each input."""

    def run(self, *arrays: Any, **named: Any) -> list[np.ndarray]:
        """All outputs, as arrays. Inputs in the file's order, or by name. SettingError if they do not fit."""
        feed = dict(zip(self.inputs, arrays, strict=False)) | named
        if len(arrays) + len(named) != len(self.inputs) or set(feed) != set(self.inputs):
            raise SettingError(
                f"{self.path.name}: it takes {len(self.inputs)} inputs ({', '.join(self.inputs)}), but given "
                f"were {len(arrays)} in order and {', '.join(named) or 'none'} by name."
            )
        plain = {name: as_array(item) for name, item in feed.items()}
        try:
            return self.call(plain)
        except self.broken as error:
            found = ", ".join(f"{name}: {described(item)}" for name, item in plain.items())
            raise SettingError(
                f"{self.path.name}: inputs {{{found}}} do not run: {self.why(error)}"
            ) from error


def as_array(item: Any) -> Any:
    """A tensor as an array. Known by its methods, since a child process does not import torch."""
    return item.detach().cpu().numpy() if hasattr(item, "detach") else item


def described(item: Any) -> str:
    return f"numpy {item.dtype} {list(item.shape)}" if isinstance(item, np.ndarray) else type(item).__name__


def checked(path: str | Path, threads: int, who: str) -> Path:
    """The file's path. SettingError for a number of threads that is none, StorageError if there is no such
    file."""
    if not isinstance(threads, int) or not 1 <= threads <= MOST_THREADS:
        raise SettingError(
            f"{who}: threads={threads!r}, but it is a number of CPU threads, 1 to {MOST_THREADS}"
        )
    path = Path(path)
    if not path.is_file():
        raise StorageError(f"{path}: no such file")
    return path


def opened(runtime: str, path: str | Path, threads: int = 1) -> Session:
    """The file in a runtime of the table."""
    session: Session = importlib.import_module(RUNTIMES[runtime].session).open(path, threads)
    return session


def first_run(runtime: str, path: Path, feeds: list[Feed]) -> list[list[np.ndarray]]:
    """Load a file and run it once for each feed. For a child process: a file that a runtime has not seen may
    crash it."""
    session = opened(runtime, path)
    return [session.run(*arrays, **named) for arrays, named in feeds]


def brief(error: BaseException) -> str:
    """The innermost cause in one line: exporters add pages of advice around it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}".rstrip(".")
