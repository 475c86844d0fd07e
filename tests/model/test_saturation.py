"""Saturation: the excess of clipped pairs by a slow loop, and whole networks as OpenVINO computes them."""

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from integer_nets import NETS, made
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.core.run import run
from tersor.core.state import State
from tersor.forms import Dense
from tersor.forms.grid import Grid
from tersor.model.saturation import Pairs, large_pairs
from tersor.model.task import Task
from tersor.steps import Export, Measure, Quantize

LAYERS: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3},
    "padded": {"kernel_size": 3, "padding": 1, "stride": 2},
    "dilated": {"kernel_size": (3, 2), "padding": (2, 1), "dilation": (2, 1)},
    "same": {"kernel_size": (2, 3), "padding": "same"},
    "groups": {"kernel_size": 3, "groups": 3, "padding": 1},
    "odd": {"kernel_size": 1, "channels": 5},
}


def clip(x: int) -> int:
    return max(-(2**15), min(2**15 - 1, x))


def slow(q: np.ndarray, w: np.ndarray, zero: int, layer: nn.Conv2d) -> np.ndarray:
    """The sums of a convolution of codes, pair after pair in Python's integers."""
    n, (outputs, inside, kh, kw) = len(q), w.shape
    if layer.padding == "same":
        whole = [d * (k - 1) for d, k in zip(layer.dilation, (kh, kw), strict=True)]
        pads = [(p // 2, p - p // 2) for p in whole]
    else:
        pads = [(p, p) for p in layer.padding]  # type: ignore[misc]
    q = np.pad(q, [(0, 0), (0, 0), *pads], constant_values=zero)
    (sh, sw), (dh, dw) = layer.stride, layer.dilation
    size = [
        (q.shape[2 + a] - d * (k - 1) - 1) // s + 1
        for a, (d, k, s) in enumerate(((dh, kh, sh), (dw, kw, sw)))
    ]
    found = np.zeros((n, outputs, *size), np.int64)
    for at in np.ndindex(*found.shape):
        image, o, y, x = at
        first = o // (outputs // layer.groups) * inside
        total = 0
        for i in range(kh):
            for j in range(kw):
                column = q[image, first : first + inside, y * sh + i * dh, x * sw + j * dw]
                terms = [int(a) * int(b) for a, b in zip(column, w[o, :, i, j], strict=True)]
                total += sum(
                    clip(sum(terms[k : k + 2])) if k + 1 < inside else terms[k] for k in range(0, inside, 2)
                )
        found[at] = total - zero * int(w[o].astype(np.int64).sum())
    return found


@pytest.mark.parametrize("name", LAYERS)
def test_a_convolution_is_that_of_a_slow_loop(name: str) -> None:
    settings = dict(LAYERS[name])
    channels = settings.pop("channels", 6)
    draws = torch.Generator().manual_seed(0)
    layer = nn.Conv2d(channels, 6, **settings)
    codes = torch.randint(-127, 128, layer.weight.shape, generator=draws).to(torch.int8)
    codes[:3] = codes[:3].abs()
    q = torch.randint(0, 256, (2, channels, 7, 6), generator=draws)
    zero, step = 90, torch.rand(6, generator=draws) + 0.5
    grid = Grid(Dense(torch.tensor([0.25])), Dense(torch.tensor([zero], dtype=torch.int16)))
    pairs = Pairs("conv2d", tuple(codes.shape), step, grid, *large_pairs(codes))
    w = codes.float() * step[:, None, None, None]
    x = (q - zero) * 0.25
    found = pairs.computed(F.conv2d, x, w, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    wanted = slow(q.numpy(), codes.numpy(), zero, layer) * 0.25 * step.numpy()[:, None, None]
    assert np.allclose(found.numpy(), wanted, rtol=1e-4, atol=1e-2)
    assert 0 < pairs.clipped < pairs.seen
    assert not torch.allclose(
        found, F.conv2d(x, w, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    )


def test_weights_of_seven_bits_have_no_such_pairs() -> None:
    assert len(large_pairs(torch.full((4, 8, 3, 3), 64, dtype=torch.int8))[0]) == 0
    assert len(large_pairs(torch.full((4, 8, 3, 3), 65, dtype=torch.int8))[0]) == 4 * 4 * 9
    assert len(large_pairs(torch.full((4, 1, 3, 3), 127, dtype=torch.int8))[0]) == 0  # depthwise


def large(net: nn.Module) -> nn.Module:
    """The net with rows of weights of one sign, so that many pairs exceed 16 bits."""
    torch.manual_seed(0)
    for p in net.parameters():
        if p.ndim > 1:
            sign = torch.where(torch.rand(p.shape[0], *[1] * (p.ndim - 1)) > 0.5, 1.0, -1.0)
            p.data = p.data.abs() ** 0.3 * sign * 0.1
    return net


def simulated(state: State, task: Task) -> Tensor:
    from tersor.steps import saturated

    view = next(iter(views(state, task)))
    net, left = saturated.saturated(view)
    assert left == []
    return net(task.example[0])


def views(state: State, task: Task) -> Any:
    """The view that a step gets."""
    found: list[Any] = []

    class Look(Measure):
        def run(self, view: Any) -> Any:
            found.append(view)
            return iter(())

    run(state, [Look()], task)
    return found


RUN = (
    "import sys, numpy as np, torch; from tersor.runtimes import openvino;"
    "x = torch.from_numpy(np.load(sys.argv[1]));"
    "np.save(sys.argv[3], openvino.open(sys.argv[2]).run(x)[0])"
)


@pytest.mark.extra
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="an instruction of x86")
@pytest.mark.parametrize("name", NETS)
def test_a_network_is_as_openvino_computes_it_without_vnni(name: str, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    net, task = made(name)
    state = run(
        large(net), [Quantize(activations=8, correct=False), Export(path="m.onnx")], task, out=tmp_path
    )
    np.save(tmp_path / "x.npy", task.example[0].numpy())
    paths = [str(tmp_path / word) for word in ("x.npy", "m.onnx", "y.npy")]
    clipped = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}
    subprocess.run([sys.executable, "-c", RUN, *paths], env=clipped, check=True)
    theirs, ours = np.load(tmp_path / "y.npy"), simulated(state, task).numpy()
    exact = state.model()(task.example[0]).numpy()
    far, near = (np.square(theirs - other).sum() ** 0.5 for other in (exact, ours))
    assert near < 0.02 * far  # now and then a sum is rounded to the next step


def test_quantize_warns_and_measure_scores_it() -> None:
    net, task = made("attended")
    for bits, wanted in ((8, True), (7, False)):
        state = run(net, [Quantize(activations=8, bits=bits)], task)
        notes = [note.text for note in state.ledger.notes("saturation")]
        assert bool(notes) == wanted
        if wanted:
            assert "exceed 16 bits in 3 layers" in notes[0]
            assert notes[0].endswith("Give bits=7 for them")
        *_, scored = run(state, [Measure(saturate=True)], task).ledger.notes("saturation")
        assert (scored.data["after"] < scored.data["before"]) == wanted
    plain = run(net, [Measure(saturate=True)], task)
    assert "nothing computes with integers" in next(iter(plain.ledger.notes("skipped"))).text


def test_an_image_without_samples_and_samples_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = Grid(Dense(torch.tensor([1.0])), Dense(torch.tensor([0], dtype=torch.int16)))
    codes = torch.full((2, 4, 3, 3), 127, dtype=torch.int8)
    x = torch.randint(0, 256, (5, 4, 6, 6), generator=torch.Generator().manual_seed(0)).float()

    def found(x: Tensor) -> Tensor:
        pairs = Pairs("conv2d", tuple(codes.shape), torch.ones(1), grid, *large_pairs(codes))
        return pairs.computed(F.conv2d, x, codes.float())

    whole = found(x)
    assert not torch.equal(whole, F.conv2d(x, codes.float()))
    assert torch.equal(found(x[0]), whole[0])
    monkeypatch.setattr("tersor.model.saturation.CHUNK", 100)
    assert torch.equal(found(x), whole)


def test_ranges_that_are_found_when_the_model_runs_are_not_simulated_and_named() -> None:
    net, task = made("mlp")
    state = run(net, [Quantize(activations=8, activation_range="dynamic"), Measure(saturate=True)], task)
    *_, scored = state.ledger.notes("saturation")
    assert set(scored.data["left"]) == {"up.weight", "down.weight", "head.weight"}
    assert "not simulated: up.weight" in scored.text


class Turned(nn.Module):
    """Weights that are read turned: a decoder with the encoder's weight, a product that is spelled out."""

    def __init__(self, inner: int):
        super().__init__()
        self.up, self.head = nn.Linear(8, inner, bias=False), nn.Linear(8, 3)
        self.mix = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(self.up(x).relu(), self.up.weight.t())
        return self.head(F.linear(x.relu(), self.mix.t()).relu())


@pytest.mark.parametrize("inner", [8, 12])
def test_weights_that_are_read_turned_are_named_and_not_simulated(inner: int) -> None:
    net = large(Turned(inner)).eval()
    x = torch.rand(16, 8, generator=torch.Generator().manual_seed(0))
    task = Task("x", evaluate=[(x, x[:, :3].argmax(1))], calibrate=[(x,)])
    (view,) = views(run(net, [Quantize(activations=8, per="tensor")], task), task)
    from tersor.steps import saturated

    simulated, left = saturated.saturated(view)
    assert {"mix", "up.weight"} <= {*left}
    exact, found = view.model()(x), simulated(x)
    assert found.shape == exact.shape
