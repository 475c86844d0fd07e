"""The public names: complete, without duplicates, each imported lazily."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

import tersor
from tersor import errors
from tersor.steps import STEPS

TREE = ast.parse(Path(tersor.__file__).read_text())


@pytest.mark.parametrize("name", tersor.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(tersor, name) is not None


def test_every_step_and_every_error_is_public() -> None:
    assert all(getattr(tersor, step.__name__) is step for step in STEPS.values())
    ours = {kind for kind in vars(errors).values() if isinstance(kind, type)}
    assert all(
        getattr(tersor, kind.__name__) is kind for kind in ours if issubclass(kind, errors.TersorError)
    )


def test_the_repr_of_a_state_is_short() -> None:
    """The default repr of a dataclass would print the module and every weight."""
    net = nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 2))
    result = tersor.run(net, [tersor.Prune(), tersor.Entropy()])
    first, *rest = repr(result).splitlines()
    assert first.startswith(f"State {result.digest}: 4 sites, {result.nbytes:,} bytes, 2 steps; ")
    assert len(rest) == 4
    assert str(result) == repr(result)
    assert len(repr(result.base)) < 100


def test_type_checkers_see_the_same_names() -> None:
    (block,) = [node for node in TREE.body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom)
            for alias in node.names}  # fmt: skip
    assert seen == tersor.HOMES


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'compres'"):
        tersor.compres  # noqa: B018


def test_dir_lists_them() -> None:
    assert set(tersor.__all__) <= set(dir(tersor))


def test_importing_loads_no_torch() -> None:
    code = "import sys, tersor; print('torch' in sys.modules, tersor.Prune.__name__, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "Prune", "True"]


def test_reading_a_file_imports_no_step_and_no_tracer() -> None:
    """They cost half a second, of each `verify` and each load in a service."""
    code = "import sys, tersor; tersor.load, tersor.verify; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert "tersor.io.container" in imported
    assert not imported & {"sympy", "tersor.steps", "tersor.steps.quantize"}
