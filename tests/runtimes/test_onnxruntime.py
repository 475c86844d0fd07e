"""ONNX files compared with torch and with the evaluator of the onnx package, for common layers."""

import copy
import logging
import resource
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as onnx_runtime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn
from torch.nn import functional as F

import tersor
from tersor.errors import FormatError, RefusedError, SettingError, StorageError
from tersor.runtimes import onnxruntime, runtime
from tersor.runtimes.agree import Comparison


class Conv(nn.Module):
    """Convolutions, one of them depthwise, batch norm with running statistics, and a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 7, 3, padding=1, bias=False), nn.BatchNorm2d(7)
        self.depthwise, self.last = nn.Conv2d(7, 7, 3, padding=1, groups=7), nn.Linear(7, 3)
        with torch.no_grad():
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.first(x)))
        return self.last((y + self.depthwise(y)).mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 6, bidirectional=True, batch_first=True)
        self.gru, self.last = nn.GRU(12, 7, batch_first=True), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.gru(self.lstm(x)[0])[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found, weights = self.inner(x, x, x)
        return found, weights


class Language(nn.Module):
    """Integer inputs, and an embedding tied to the output."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(300, 64)
        self.block = nn.TransformerEncoderLayer(64, 2, 16, batch_first=True, norm_first=True)
        self.head = nn.Linear(64, 300, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.block(self.embed(tokens), is_causal=False))


class Named(nn.Module):
    """Keyword inputs, one of them unused; a dict comes out."""

    def forward(self, *, b: Tensor, a: Tensor, unused: Tensor) -> dict[str, Tensor]:
        return {"difference": a - b, "double": a * 2}


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


CASES: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "linear of width one": (lambda: nn.Linear(1, 1), (x(2, 1),)),
    "conv": (Conv, (x(2, 1, 6, 5),)),
    "recurrent": (Recurrent, (x(3, 4, 5),)),
    "attention": (Attention, (x(2, 4, 8),)),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (x(2, 4, 8),)),
    "language": (Language, (torch.arange(12).reshape(2, 6) % 50,)),
    "names": (Named, {"a": x(2, 3), "b": x(2, 3) + 1, "unused": x(2, 1)}),
}


def built(name: str) -> tuple[nn.Module, Any]:
    make, example = CASES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return make().train(), example


def batch_of(example: Any, n: int) -> Any:
    def stretch(item: Tensor) -> Tensor:
        return item[torch.arange(n) % len(item)] + (item[:1] * 0)

    if isinstance(example, dict):
        return {key: stretch(item) for key, item in example.items()}
    return tuple(map(stretch, example))


def plain(model: nn.Module, example: Any) -> list[np.ndarray]:
    with torch.no_grad():
        twin = copy.deepcopy(model).eval()
        found = twin(**example) if isinstance(example, dict) else twin(*example)
    if isinstance(found, dict):
        found = tuple(found.values())
    return [item.numpy() for item in (found if isinstance(found, tuple) else (found,))]


@pytest.mark.sampled(name=("conv", "names", "linear of width one"))
@pytest.mark.parametrize("name", CASES)
def test_exports_agree_and_leave_the_model_alone(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    model, example = built(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    attributes = {key: set(vars(module)) for key, module in model.named_modules()}
    state = torch.get_rng_state()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        written = onnxruntime.write(model, example, tmp_path / "m.onnx")
    assert not heard
    assert capfd.readouterr() == ("", "")
    assert not [item for item in caplog.records if item.levelno > logging.DEBUG]
    assert logging.root.manager.disable == logging.NOTSET
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert attributes == {key: set(vars(module)) for key, module in model.named_modules()}
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert [item.name for item in tmp_path.iterdir()] == ["m.onnx"]
    assert written.nbytes == (tmp_path / "m.onnx").stat().st_size

    session = onnxruntime.open(written.path)
    for n in (1, 2, 5):
        inputs = batch_of(example, n)
        found = session.run(**inputs) if isinstance(inputs, dict) else session.run(*inputs)
        expected = plain(model, inputs)
        assert len(found) == len(expected)
        for a, b in zip(expected, found, strict=True):
            assert a.shape == b.shape
            assert np.abs(a - b).max() <= 1e-5 * max(1, np.abs(a).max())

    # The onnx package's numpy implementation and its checker agree on the file.
    onnx.checker.check_model(str(written.path), full_check=True)
    feed = example if isinstance(example, dict) else dict(zip(session.inputs, example, strict=True))
    feed = {key: item.numpy() for key, item in feed.items()}
    others = ReferenceEvaluator(onnx.load(written.path)).run(None, feed)
    for a, b in zip(plain(model, example), others, strict=True):
        assert np.abs(a - b).max() <= 1e-5 * max(1, np.abs(a).max())
    data, weights = written.path.read_bytes(), sum(value.nbytes for value in model.parameters())
    assert b"site-packages" not in data
    assert str(Path(__file__).parent).encode() not in data
    assert (
        weights <= written.nbytes < weights + 16_000
    )  # tied weights are written once, as parameters() counts them
    if name == "attention":
        again = onnxruntime.write(copy.deepcopy(model).eval(), example, tmp_path / "again.onnx")
        assert again.sha256 == written.sha256, "files repeat"


def test_a_fixed_batch(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(2, 3) + torch.ones(2, 3)

    path, example = tmp_path / "m.onnx", (x(2, 3),)
    with pytest.raises(RefusedError, match=r"Fixed .*float32 \[1, 3\].*dynamic_batch=false"):
        onnxruntime.write(Fixed(), example, path)
    assert not list(tmp_path.iterdir())
    onnxruntime.write(Fixed(), example, path, dynamic_batch=False)
    session = onnxruntime.open(path)
    assert np.allclose(session.run(example[0])[0], (example[0] + 1).numpy())
    with pytest.raises(SettingError, match=r"m.onnx: inputs .*\[3, 3\].* do not run"):
        session.run(np.zeros((3, 3), np.float32))


def test_arguments_in_order_that_share_one_name(tmp_path: Path) -> None:
    class Several(nn.Module):
        def forward(self, *images: Tensor, **rest: Any) -> Tensor:
            return images[0] * images[1]

    onnxruntime.write(Several(), (x(2, 3), x(2, 3)), tmp_path / "m.onnx")
    one, two = x(5, 3), x(5, 3) + 1
    session = onnxruntime.open(tmp_path / "m.onnx")
    assert np.allclose(session.run(one, two)[0], (one * two).numpy())


class Cache:
    """An output that torch.export has no type for."""


@dataclass
class Answer:
    """A container that torch.export has no type for."""

    scores: Tensor
    cache: Cache
    hidden: tuple[Tensor, Any]


def test_outputs_without_a_type_are_left_out_by_name(tmp_path: Path) -> None:
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Answer:
            y = self.layer(x)
            return Answer(y, Cache(), (y.relu(), Cache()))

    model, example = Remembers(), x(2, 3)
    written = onnxruntime.write(model, (example,), tmp_path / "m.onnx")
    assert written.left_out == ("cache (Cache)", "hidden.1 (Cache)")
    found, wanted = onnxruntime.open(written.path).run(example), model(example)
    for mine, theirs in zip(found, (wanted.scores, wanted.hidden[0]), strict=True):
        assert np.allclose(mine, theirs.detach().numpy(), atol=1e-6)

    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> Cache:
            return Cache()

    with pytest.raises(RefusedError, match="output holds no tensor"):
        onnxruntime.write(Nothing(), (example,), tmp_path / "n.onnx")


class Counts(nn.Module):
    """A model whose traced output is constant, and whose output changes with each call."""

    def __init__(self, step: float) -> None:
        super().__init__()
        self.calls, self.step = 0, step

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * (1 + self.calls * self.step)


def test_a_file_that_disagrees_is_refused_and_the_earlier_one_stays(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    before = b"the earlier file"
    path.write_bytes(before)
    with pytest.raises(RefusedError, match="does not compute what Counts does: they differ by"):
        onnxruntime.write(Counts(0.5), (x(2, 3),), path)
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["m.onnx"]
    with pytest.raises(RefusedError, match=r"allowed: 0\.001"):
        onnxruntime.write(Counts(0.01), (x(2, 3),), path)
    onnxruntime.write(Counts(0.01), (x(2, 3),), path, tolerance=0.1)
    assert path.read_bytes() != before


def test_what_cannot_be_traced_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(RefusedError, match=r"Branches cannot be exported with inputs \(float32 \[2, 3\]\)"):
        onnxruntime.write(Branches(), (x(2, 3),), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


def test_a_full_disk(tmp_path: Path) -> None:
    """A limit on file sizes gives the same system error, after some bytes are written."""
    path = tmp_path / "m.onnx"
    before = b"the earlier file"
    path.write_bytes(before)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(StorageError, match="m.onnx: cannot be written: File too large"):
            onnxruntime.write(nn.Linear(100, 100), (x(2, 100),), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["m.onnx"]


def test_weights_beyond_one_file_lie_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "ONE_FILE", 0)
    model = nn.Linear(64, 64)
    written = onnxruntime.write(model, (x(2, 64),), tmp_path / "deep" / "m.onnx")
    assert sorted(written.files) == ["m.onnx", "m.onnx.data"]
    assert sorted(item.name for item in (tmp_path / "deep").iterdir()) == ["m.onnx", "m.onnx.data"]
    assert written.nbytes == sum(item.stat().st_size for item in (tmp_path / "deep").iterdir())
    assert onnxruntime.compare(model, written.path, [(x(5, 64),)]).max_rel < 1e-5


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda p: onnxruntime.write("net", (x(2, 3),), p / "m.onnx"), SettingError, "model is a str"),
        (lambda p: onnxruntime.write(nn.Identity(), (x(2, 3),), p / "m.bin"), SettingError, "name it m.onnx"),
        (lambda p: onnxruntime.write(nn.Identity(), (3,), p / "m.onnx"), SettingError, "holds no tensor"),
        (
            lambda p: onnxruntime.write(nn.Identity(), (x(2),), p / "file" / "m.onnx"),
            StorageError,
            "cannot be",
        ),
        (lambda p: onnxruntime.open(p / "none.onnx"), StorageError, "no such file"),
        (lambda p: onnxruntime.open(p / "file"), FormatError, "file: ONNX Runtime cannot load it"),
        (lambda p: onnxruntime.open(p / "file", threads=0), SettingError, "threads=0"),
        (lambda p: runtime("onnxruntine"), SettingError, "did you mean 'onnxruntime'"),
    ],
)
def test_bad_calls(tmp_path: Path, call: Callable[[Path], Any], error: type[Exception], words: str) -> None:
    (tmp_path / "file").write_text("no model")
    with pytest.raises(error, match=words):
        call(tmp_path)


def linear(path: Path) -> Path:
    """A file that Tersor did not write: y = x W + b with 3 inputs and 2 outputs."""
    g = np.random.default_rng(0)
    make, f32 = onnx.helper, onnx.TensorProto.FLOAT
    graph = make.make_graph(
        [make.make_node("Gemm", ["x", "w", "b"], ["y"])],
        "linear",
        [make.make_tensor_value_info("x", f32, ["B", 3])],
        [make.make_tensor_value_info("y", f32, ["B", 2])],
        [
            onnx.numpy_helper.from_array(g.normal(size=shape).astype(np.float32), name)
            for name, shape in (("w", (3, 2)), ("b", (2,)))
        ],
    )
    onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_sessions_refuse_inputs_that_do_not_fit(tmp_path: Path) -> None:
    path = linear(tmp_path / "m.onnx")
    session = runtime("onnxruntime").open(path, threads=2)
    array = np.zeros((4, 3), np.float32)
    assert session.run(array)[0].shape == (4, 2)
    assert session.run(**{session.inputs[0]: array})[0].shape == (4, 2)
    for wrong in ((), (array, array)):
        with pytest.raises(SettingError, match="takes 1 inputs"):
            session.run(*wrong)
    with pytest.raises(SettingError, match="nope by name"):
        session.run(nope=array)
    with pytest.raises(SettingError, match="float64"):
        session.run(array.astype(np.float64))


def test_a_session_has_the_threads_that_were_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, sessions, real = linear(tmp_path / "m.onnx"), [], onnx_runtime.InferenceSession

    def opened(*args: Any, **kwargs: Any) -> Any:
        sessions.append(real(*args, **kwargs))
        return sessions[-1]

    monkeypatch.setattr(onnx_runtime, "InferenceSession", opened)
    for threads in (1, 3):
        onnxruntime.open(path, threads=threads)
    options = [session.get_session_options() for session in sessions]
    assert [o.intra_op_num_threads for o in options] == [1, 3]
    assert [o.inter_op_num_threads for o in options] == [1, 1]


def test_differences_are_measured_correctly() -> None:
    a = np.array([[1.0, 4.0], [3.0, 0.0], [0.0, 1.0]])
    b = np.array([[1.0, 3.5], [0.0, 3.0], [0.0, 1.0]])
    comparison = Comparison()
    comparison.add([a[:2]], [b[:2]])
    comparison.add([a[2:]], [b[2:]])
    found = comparison.result()
    assert (found.max_abs, found.max_rel, found.agree, found.samples) == (3.0, 1.0, 2 / 3, 3)
    assert found.rms_rel == pytest.approx((0.5**2 + 3**2 + 3**2) ** 0.5 / 27**0.5)


@pytest.mark.parametrize("apart", ["outputs", "channels", "last", "numbers"])
def test_a_large_output_or_channel_hides_no_error_of_another(apart: str) -> None:
    random = np.random.default_rng(0)
    boxes, scores = 600 * random.random((2, 50, 4)), random.random((2, 50, 3))
    wrong = scores + 0.25

    def given(scores: np.ndarray) -> list[np.ndarray]:
        if apart == "outputs":
            return [boxes, scores]
        if apart == "numbers":
            return [boxes, scores.mean()]
        both = np.concatenate([boxes, scores], 2)  # [B, N, C]
        return [both if apart == "last" else both.transpose(0, 2, 1)]

    comparison = Comparison()
    comparison.add(given(scores), given(wrong))
    found = comparison.result()
    assert 0.2 < found.max_rel < 1
    assert found.max_abs == pytest.approx(0.25)
    comparison = Comparison()
    comparison.add(given(scores), given(scores + 1e-4))  # as rounding of the large ones
    assert comparison.result().max_rel == 0


class TwoSizes(nn.Module):
    """Two outputs, the first a thousand times the second, which ONNX Runtime averages differently."""

    def __init__(self, joined: bool) -> None:
        super().__init__()
        self.conv, self.joined = nn.Conv2d(3, 4, 3, padding=1), joined
        self.pool = nn.AvgPool2d(2, 2, divisor_override=3)  # the exporter writes a plain average

    def forward(self, images: Tensor) -> Any:
        seen = self.conv(images)
        large, small = 1000 * seen[..., ::2, ::2], self.pool(seen)
        return torch.cat([large, small], 1) if self.joined else (large, small)


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("steps", [[], [tersor.Quantize(activations=8)]], ids=["float", "int8"])
def test_a_file_whose_small_output_is_wrong_is_refused(
    joined: bool, steps: list[Any], tmp_path: Path
) -> None:
    batches = [(x(4, 3, 8, 8),), (x(4, 3, 8, 8) + 0.1,)]
    task = tersor.Task("two sizes", calibrate=batches, evaluate=batches)
    # Joined, both share a grid. With 2 of 60 seeds its steps are coarse enough to hide the small output.
    torch.manual_seed(0)
    with pytest.raises(RefusedError, match="does not compute what TwoSizes does"):
        tersor.run(TwoSizes(joined).eval(), [*steps, tersor.Export()], task, out=tmp_path)


def test_texts_of_other_lengths_are_compared() -> None:
    comparison = Comparison()
    for tokens in (3, 5, 2):
        a = np.ones((2, tokens, 7))
        comparison.add([a], [a * 1.5])
    assert comparison.result().max_rel == 0.5


def test_differences_of_values_that_are_not_finite() -> None:
    def between(a: list[float], b: list[float]) -> float:
        comparison = Comparison()
        comparison.add([np.array([a])], [np.array([b])])
        return comparison.result().max_rel

    inf, nan = np.inf, np.nan
    assert between([inf, nan, 1], [inf, nan, 1]) == 0
    assert between([1, 2], [nan, 2]) == inf
    assert between([nan, 2], [1, 2]) == inf
    assert between([inf, 2], [-inf, 2]) == inf
    assert between([0, 0], [0, 0]) == 0
    assert between([0, 0], [0, 1]) == inf


def test_comparisons_of_nothing_or_of_other_shapes(tmp_path: Path) -> None:
    path = linear(tmp_path / "m.onnx")
    with pytest.raises(RefusedError, match="no batch to compare"):
        onnxruntime.compare(nn.Linear(3, 2), path, [])
    with pytest.raises(RefusedError, match=r"\[\[2, 4\]\], the runtime of \[\[2, 2\]\]"):
        onnxruntime.compare(nn.Linear(3, 4), path, [(x(2, 3),)])
    other = nn.Linear(3, 2)
    with pytest.raises(RefusedError, match="does not compute what Linear does"):
        onnxruntime.compare(other, path, [x(2, 3)])
    assert onnxruntime.compare(other, path, [x(2, 3)], tolerance=None).max_abs > 0


def test_floats_without_kernels_are_refused_with_a_way_out(tmp_path: Path) -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4).bfloat16()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.bfloat16()).float()

    with pytest.raises(RefusedError, match=r"bfloat16: give the model in float32, model.float\(\)") as caught:
        onnxruntime.write(Half(), (torch.zeros(2, 3),), tmp_path / "half.onnx")
    assert str(tmp_path) not in str(caught.value), "the file is named as the caller named it"
    assert not list(tmp_path.iterdir())
