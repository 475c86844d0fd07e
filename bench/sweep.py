"""Sweep: one process a model, each with a limit of processor time. Shared by the benches of many models.

Processor time does not grow with other load on the machine. A model that crashes or takes too long is a
finding, and the sweep goes on.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Protocol

from table import Row, record

PATIENCE = 20  # limit of wall-clock time, in units of the seconds


class HasFamily(Protocol):
    @property
    def family(self) -> str: ...


def chosen(words: Iterable[str], cases: Mapping[str, HasFamily]) -> list[str]:
    """The names that words mean: a family, or a glob; all for no word. KeyError for a word without any."""
    found: dict[str, None] = {}
    for word in list(words) or ["*"]:
        names = [name for name, case in cases.items() if word == case.family or fnmatchcase(name, word)]
        if not names:
            raise KeyError(word)
        found |= dict.fromkeys(names)
    return list(found)


def answered(script: str, name: str, seconds: int, *more: str, patience: float = PATIENCE) -> dict[str, Any]:
    """The last line of JSON of `script --here --seconds SECONDS NAME`, in a process with one thread.

    {"name", "verdict": "crashed", "said"} if there is none.
    """
    command = [sys.executable, script, "--here", "--seconds", str(seconds), *more, name]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    late = {"name": name, "verdict": "crashed", "said": f"not done after {seconds} s", "seconds": seconds}
    try:
        ran = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=patience * seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return late
    if ran.returncode == -signal.SIGXCPU:
        return late
    if ran.returncode:
        last = (ran.stderr.strip().splitlines() or [""])[-1]
        said = f"the process ended with {ran.returncode}: {last}"
        return {"name": name, "verdict": "crashed", "said": said}
    found: dict[str, Any] = json.loads(ran.stdout.strip().splitlines()[-1])
    return found


def told(rows: Sequence[Row], keep: bool) -> None:
    """Print the rows, and with `keep` put them into bench/results.csv and its page."""
    for row in rows:
        print(f"{row.subject}: {row.measure}: {row.value} {row.unit} {row.target} {row.note}".rstrip())
    if keep:
        import page

        record(rows)
        page.write()
