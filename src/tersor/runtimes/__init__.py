"""Runtimes: where a compressed model can run. One file each, with `write`, `open` and `compare`.

The table names modules and packages, so that reading it imports none of them. Each runtime is an extra of the
same name: pip install 'tersor[onnxruntime]'.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import NamedTuple

from tersor.errors import SettingError, did_you_mean, first_line, need


class Runtime(NamedTuple):
    """Our module for a runtime, and the packages that it imports."""

    module: str
    packages: tuple[str, ...]


RUNTIMES: dict[str, Runtime] = {
    "onnxruntime": Runtime("tersor.runtimes.onnxruntime", ("onnx", "onnxscript", "onnxruntime")),
}


def check_runtime(name: str, who: str) -> None:
    """Refuse a runtime that cannot be used, before hours of training: SettingError for a name that is not in
    the table, MissingError for a package that cannot be imported. `who` is the step that asks."""
    if name not in RUNTIMES:
        raise SettingError(f"{who}: runtime {name!r}; {did_you_mean(name, RUNTIMES)}")
    for package in RUNTIMES[name].packages:
        try:
            importlib.import_module(package)
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
