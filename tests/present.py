"""Which runtimes are installed. A test of one that is not is skipped, or fails in make test-extras."""

import importlib.util
from types import ModuleType

import pytest

from tersor.runtimes import RUNTIMES, runtime

# make test installs what the first one needs.
EACH = [pytest.param(name, marks=[] if name == "onnxruntime" else [pytest.mark.extra]) for name in RUNTIMES]


def present(name: str) -> ModuleType:
    """A runtime's module. Not by importorskip alone: it imports, and openvino reports that to its vendor."""
    for package in RUNTIMES[name].packages:
        if importlib.util.find_spec(package) is None:
            pytest.importorskip(package)
    return runtime(name)
