"""Runtimes: where a compressed model can run. One file each, with `write`, `open`, `compare` and `operators`.

The table names modules and packages, so that reading it imports none of them. Each runtime is an extra of
the same name: pip install 'tersor[onnxruntime]'. What loads and runs a file is a module of its own, without
torch, so that a child process has it ready in half a second (contained.py).
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import NamedTuple

from tersor.errors import SettingError, did_you_mean, first_line, need

# A runtime makes all of its threads before it runs: with this many it seems to hang.
MOST_THREADS = 1024
# `import openvino` imports it and sends an event. Where it is missing, OpenVINO has a stub for it.
REPORTS_USE = "openvino_telemetry"


class Runtime(NamedTuple):
    """Our modules for a runtime, the packages that they import, and its name in reports."""

    module: str
    session: str  # the part without torch: open, operators
    packages: tuple[str, ...]
    title: str


RUNTIMES: dict[str, Runtime] = {
    "onnxruntime": Runtime(
        "tersor.runtimes.onnxruntime",
        "tersor.runtimes.onnxruntime_session",
        ("onnx", "onnxscript", "onnxruntime"),
        "ONNX Runtime",
    ),
    "openvino": Runtime(
        "tersor.runtimes.openvino",
        "tersor.runtimes.openvino_session",
        ("onnx", "onnxscript", "onnxruntime", "openvino"),
        "OpenVINO",
    ),
}


def check_runtime(name: str, who: str) -> None:
    """Refuse a runtime that cannot be used, before hours of training: SettingError for a name that is not in
    the table, MissingError for a package that cannot be imported. `who` is the step that asks."""
    if name not in RUNTIMES:
        raise SettingError(f"{who}: runtime {name!r}; {did_you_mean(name, RUNTIMES)}")
    for package in RUNTIMES[name].packages:
        try:
            imported(package)
        except ImportError as error:
            text = (
                ""
                if isinstance(error, ModuleNotFoundError) and error.name == package
                else f" ({first_line(error)})"
            )
            raise need(f"{package}{text}", name, f"{who} with {name}") from None


def runtime(name: str) -> ModuleType:
    """The module of a runtime. Errors as check_runtime."""
    check_runtime(name, "runtimes")
    return importlib.import_module(RUNTIMES[name].module)


def imported(package: str) -> ModuleType:
    """Import a package without the one that would report to its vendor that it is used."""
    if REPORTS_USE in sys.modules or package in sys.modules:  # it is the caller's, who imported it before
        return importlib.import_module(package)
    sys.modules[REPORTS_USE] = None  # type: ignore[assignment]
    try:
        return importlib.import_module(package)
    finally:
        del sys.modules[REPORTS_USE]
