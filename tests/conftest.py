"""What all tests share: how hypothesis searches, a guard on torch's global state, where the data is."""

import gc
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from sampled import mark_wide
from traces import once, tables_once

# ci repeats the same examples, so that a red run is red again; nightly looks for new ones.
# A slow machine is no finding, hence no deadline; a generator that filters too much still is one.
settings.register_profile(
    "ci", deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("nightly", settings.get_profile("ci"), derandomize=False, max_examples=1500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# Tests leave much that only the collector frees, among a million objects of imported packages: looking at all
# of them less often saves a tenth of the time.
gc.set_threshold(5000, 10, 20)


def required(name: str, *_: Any, **__: Any) -> ModuleType:
    """What pytest.importorskip is where every extra has to be there."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pytest.fail(f"make test-extras installs {name}, but it cannot be imported: {error}")


if os.environ.get("TERSOR_EXTRAS"):  # set by make test-extras
    pytest.importorskip = required


def pytest_configure(config: pytest.Config) -> None:
    """Loops are compiled before tests begin, and not by each worker; no test sees the line about it."""
    if "PYTEST_XDIST_WORKER" in os.environ or config.option.collectonly:
        return
    from tersor.compiled import begin, compile_module, loop_modules

    begin(loop_modules()[-1:])
    for module in loop_modules():
        compile_module(module)


@pytest.hookimpl(tryfirst=True)  # before -m picks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of large tables a sample stays in make test: see sampled.py."""
    mark_wide(items)


DEBIAN_FOLDER = "/usr/share/datasets/fashion-mnist"

# What a test might change for all that follow: how to read it, how to put it back.
GLOBALS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "grad enabled": (torch.is_grad_enabled, torch.set_grad_enabled),
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    # Not set to "cpu" again: that would leave a function mode on top of every call, where there was none.
    "default device": (torch.get_default_device, lambda _: torch.set_default_device(None)),
    "deterministic algorithms": (
        torch.get_deterministic_debug_mode,  # 0 off, 1 warn, 2 refuse: both flags in one number
        torch.set_deterministic_debug_mode,
    ),
    "threads": (torch.get_num_threads, torch.set_num_threads),
    "matmul precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """A test leaves torch's global state as it found it, or it fails and the state is put back."""
    before = {name: get() for name, (get, _) in GLOBALS.items()}
    yield
    after = {name: get() for name, (get, _) in GLOBALS.items()}
    changed = [name for name in GLOBALS if after[name] != before[name]]
    for name in changed:
        GLOBALS[name][1](before[name])
    if changed:
        listing = ", ".join(f"{name}: {before[name]} -> {after[name]}" for name in changed)
        pytest.fail(f"the test changed torch's global state ({listing})")


@pytest.fixture(autouse=True, scope="session")
def traced_once() -> Iterator[None]:
    """Each structure is traced once a worker: see traces.py."""
    from tersor.model import given_model, graph, nan_propagation
    from tersor.model.channels import groups
    from tersor.steps import activations, fold

    users = (given_model, groups, fold, activations, nan_propagation)
    remembered = once(graph.traced)
    for module in users:
        module.traced = remembered
    yield
    for module in users:
        module.traced = graph.traced


@pytest.fixture(autouse=True, scope="session")
def onnx_tables_once() -> Iterator[None]:
    """Each export makes the same tables of operators anew, in half of its time. Here the first export makes
    them: tests that export nothing need not import onnxscript."""
    export = torch.onnx.export

    def first(*args: Any, **kwargs: Any) -> Any:
        torch.onnx.export = export
        tables_once()
        return export(*args, **kwargs)

    torch.onnx.export = first
    yield
    torch.onnx.export = export


@pytest.fixture(scope="session")
def fashion_mnist() -> Path:
    """The folder with Fashion-MNIST's four IDX files."""
    folder = Path(os.environ.get("FASHION_MNIST", DEBIAN_FOLDER))
    if not (folder / "train-images-idx3-ubyte.gz").is_file():
        pytest.skip(
            f"no Fashion-MNIST in {folder}: install Debian's package dataset-fashion-mnist, "
            "or name its folder in FASHION_MNIST"
        )
    return folder


BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture(scope="module")
def bench():
    """Modules of bench/, which is a folder of scripts and no package."""
    names = {path.stem for path in BENCH.glob("*.py")}
    sys.path.insert(0, str(BENCH))

    def take(name: str) -> ModuleType:
        return importlib.import_module(name)

    try:
        yield take
    finally:
        sys.path.remove(str(BENCH))
        for name in names:
            sys.modules.pop(name, None)
