"""Runtimes: where a compressed model can run. One file each, with `write`, `open` and `compare`.

The table holds names of modules, so that reading it imports none of them.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from tersor.errors import SettingError, did_you_mean

RUNTIMES: dict[str, str] = {"onnxruntime": "tersor.runtimes.onnxruntime"}


def runtime(name: str) -> ModuleType:
    """The module of a runtime; SettingError for a name that is not in the table."""
    if name not in RUNTIMES:
        raise SettingError(f"runtime {name!r}: {did_you_mean(name, RUNTIMES)}")
    return importlib.import_module(RUNTIMES[name])
