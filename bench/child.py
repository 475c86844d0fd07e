"""Child: a part of a bench in another process, perhaps another interpreter, that answers in lines of JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from tersor.errors import TersorError

SOURCE = Path(__file__).resolve().parent.parent / "src"
NOT_INSTALLED = 3  # exit code
MB = 1_000_000


def replies(words: Sequence[str], limit: float) -> list[dict[str, Any]] | None:
    """Run a command with one thread. Returns its lines of JSON, None if its library is not installed.

    TersorError if it fails, or takes more than `limit` seconds.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{SOURCE}"}
    try:
        ran = subprocess.run(
            words, env=environment, capture_output=True, text=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        raise TersorError(f"bench: not done after {limit:g} s: {' '.join(words)}") from None
    if ran.returncode == NOT_INSTALLED:
        return None
    if ran.returncode:
        raise TersorError(f"bench: {' '.join(words)} ended with {ran.returncode}:\n{ran.stderr[-2000:]}")
    return [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]


def answer() -> TextIO:
    """The stream of the lines. From now on other output, a library's too, goes to stderr."""
    stream = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return stream


def peak() -> float:
    """The largest resident memory of this process so far, in MB."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / MB
    except OSError:
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return used / MB if sys.platform == "darwin" else 1024 * used / MB
