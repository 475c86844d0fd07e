"""Contract of runtimes: what each one of the table must do, in the same words and with the same errors."""

import inspect
import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qdq
import to_contain
import torch
from present import EACH, present
from test_onnxruntime import batch_of, built, plain, x
from torch import Tensor, nn

from tersor.errors import FormatError, MissingError, RefusedError, SettingError, StorageError
from tersor.runtimes import RUNTIMES, agree, check_runtime, runtime
from tersor.runtimes.operators import Operator

ROOT = Path(__file__).resolve().parents[2]
SIGNATURES = {
    "write": {
        "model": None,
        "example": None,
        "path": None,
        "dynamic_batch": True,
        "dynamic_axes": (),
        "tolerance": 1e-3,
    },
    "open": {"path": None, "threads": 1},
    "compare": {"model": None, "path": None, "batches": None, "tolerance": 1e-3},
    "operators": {"path": None, "inputs": None, "threads": 1},
}


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("word", SIGNATURES)
def test_signatures(name: str, word: str) -> None:
    given = inspect.signature(getattr(present(name), word)).parameters
    defaults = {k: None if p.default is p.empty else p.default for k, p in given.items()}
    wanted = SIGNATURES[word]
    assert dict(list(defaults.items())[: len(wanted)]) == wanted
    assert all(p.default is not p.empty for k, p in given.items() if k not in wanted), "settings of its own"


@pytest.mark.sampled(case=("conv", "names"))
@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("case", ["conv", "recurrent", "names"])
def test_a_file_gives_torchs_outputs_at_any_batch_size(
    name: str, case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    module, (model, example) = present(name), built(case)
    written = module.write(model, example, tmp_path / "m.onnx")
    assert (written.path, written.files) == (tmp_path / "m.onnx", ("m.onnx",))
    assert [item.name for item in tmp_path.iterdir()] == ["m.onnx"]
    session = module.open(written.path)
    for n in (1, 2, 5):
        inputs = batch_of(example, n)
        found = session.run(**inputs) if isinstance(inputs, dict) else session.run(*inputs)
        expected = plain(model, inputs)
        assert len(found) == len(expected) == len(session.outputs)
        for a, b in zip(expected, found, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert np.abs(a - b).max() <= 1e-5 * max(1, np.abs(a).max())
    assert isinstance(example, dict) <= (set(session.inputs) == set(example))
    found = module.compare(model, written.path, [batch_of(example, 5), example])
    assert found.max_rel < 1e-5
    ran = module.operators(written.path, example)
    assert ran
    assert all(isinstance(item, Operator) for item in ran)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", EACH)
def test_outputs_are_the_callers(name: str, tmp_path: Path) -> None:
    """A later run does not write over what an earlier one gave, and inputs stay as they were."""
    session = present(name).open(qdq.network(tmp_path / "m.onnx"))
    one, two = qdq.inputs(4)[:2], qdq.inputs(4)[2:]
    kept = one.copy()
    first = session.run(one)[0]
    copied = first.copy()
    second = session.run(two)[0]
    assert np.array_equal(first, copied)
    assert np.array_equal(one, kept)
    assert not np.allclose(first, second)
    strided = np.asfortranarray(one)
    assert np.array_equal(session.run(strided)[0], first)
    assert np.array_equal(session.run(x=torch.from_numpy(one).requires_grad_())[0], first)


class Two(nn.Module):
    """Outputs of several shapes and dtypes, one of them the input, in an order that no sorting gives."""

    def forward(self, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (b * 2).sum(1), a + 1, b


@pytest.mark.parametrize("name", EACH)
def test_inputs_and_outputs_are_in_order(name: str, tmp_path: Path) -> None:
    module, example = present(name), (x(3, 4), torch.arange(6).reshape(3, 2))
    written = module.write(Two(), example, tmp_path / "m.onnx")
    session = module.open(written.path)
    assert [word[0] for word in session.inputs] == ["b", "a"]
    for found, wanted in zip(session.run(*example), Two()(*example), strict=True):
        assert found.dtype == wanted.numpy().dtype
        assert np.allclose(found, wanted.numpy())


WRONG: dict[str, tuple[Callable[[np.ndarray], tuple[list[Any], dict[str, Any]]], str]] = {
    "none": (
        lambda a: ([], {}),
        r"m.onnx: it takes 1 inputs \(x\), but given were 0 in order and none by name",
    ),
    "two": (lambda a: ([a, a], {}), "given were 2 in order"),
    "other name": (lambda a: ([], {"y": a}), "given were 0 in order and y by name"),
    "dtype": (
        lambda a: ([a.astype(np.float64)], {}),
        r"m.onnx: inputs \{x: numpy float64 \[2, 3, 9, 7\]\} do",
    ),
    "integers": (lambda a: ([a.astype(np.int64)], {}), "numpy int64"),
    "channels": (lambda a: ([a[:, :2]], {}), r"numpy float32 \[2, 2, 9, 7\]\} do not run"),
    "axes": (lambda a: ([a[0]], {}), r"numpy float32 \[3, 9, 7\]\} do not run"),
    "text": (lambda a: (["a"], {}), r"x: str\} do not run"),
}


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("case", WRONG)
def test_inputs_that_do_not_fit(name: str, case: str, tmp_path: Path) -> None:
    session, array = present(name).open(qdq.network(tmp_path / "m.onnx")), qdq.inputs(2)
    before = session.run(array)[0]
    wrong, says = WRONG[case]
    arrays, named = wrong(array)
    with pytest.raises(SettingError, match=says):
        session.run(*arrays, **named)
    assert np.array_equal(session.run(array)[0], before), "the session goes on"


@pytest.mark.parametrize("name", EACH)
def test_bad_files(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    module, good = present(name), qdq.network(tmp_path / "good.onnx").read_bytes()
    title = RUNTIMES[name].title
    for word, data in {"text": b"no model", "cut": good[: len(good) // 2], "zeros": bytes(2000)}.items():
        path = tmp_path / f"{word}.onnx"
        path.write_bytes(data)
        for call in (module.open, lambda path: module.operators(path, (x(2, *qdq.SHAPE),))):
            with pytest.raises(FormatError, match=rf"{word}\.onnx: {title} cannot load it: "):
                call(path)
    (tmp_path / "empty.onnx").touch()
    with pytest.raises(FormatError, match=r"empty\.onnx: "):
        module.open(tmp_path / "empty.onnx")
    with pytest.raises(StorageError, match="no such file"):
        module.open(tmp_path / "none.onnx")
    for threads in (0, 1.5, "2", 100_000):
        with pytest.raises(SettingError, match=f"{name}: threads={threads!r}, but it is a number"):
            module.open(tmp_path / "good.onnx", threads=threads)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", EACH)
def test_a_file_that_differs_or_crashes_is_refused_and_the_earlier_one_stays(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, path = present(name), tmp_path / "m.onnx"
    path.write_bytes(b"the earlier file")
    real = agree.contained

    def off_by_one(function: Any, runtime: str, *args: Any, who: str) -> Any:
        found = real(function, runtime, *args, who=who)
        return [[item + 1 for item in batch] for batch in found] if runtime == name else found

    def crashing(function: Any, runtime: str, *args: Any, who: str) -> Any:
        return real(to_contain.aborts if runtime == name else function, runtime, *args, who=who)

    crashes = f"{RUNTIMES[name].title} cannot run m.onnx: its process ended with signal SIGABRT"
    for fault, says in ((off_by_one, "Linear does: they differ by 1,"), (crashing, crashes)):
        monkeypatch.setattr(agree, "contained", fault)
        with pytest.raises(RefusedError, match=f"^{name}: .*{says}"):
            module.write(nn.Linear(3, 2), (x(2, 3),), path)
        assert path.read_bytes() == b"the earlier file"
        assert [item.name for item in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize(
    ("name", "package"), [(name, package) for name in RUNTIMES for package in RUNTIMES[name].packages]
)
def test_a_missing_package_names_the_extra(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in RUNTIMES[name].packages:
        monkeypatch.setitem(sys.modules, other, sys.modules[__name__])
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        MissingError, match=rf"^step with {name} needs the package {package}\. .*'tersor\[{name}\]'"
    ):
        check_runtime(name, "step")


def test_every_runtime_is_an_extra_that_installs_its_packages() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

    def packages(extra: str) -> set[str]:
        found: set[str] = set()
        for line in extras[extra]:
            name = re.match(r"[\w-]+", line)[0]
            inner = re.match(r"tersor\[([\w,]+)\]", line)
            found |= set().union(*map(packages, inner[1].split(","))) if inner else {name}
        return found

    for name in RUNTIMES:
        assert set(RUNTIMES[name].packages) <= packages(name)
        assert packages(name) <= packages("all") & packages("integrations")


def test_an_unknown_runtime_gets_the_nearest_name() -> None:
    with pytest.raises(SettingError, match=r"did you mean 'openvino'\? Allowed: onnxruntime, openvino"):
        runtime("openvina")
