"""Integer edges: the choice for nets whose answer is written down by hand."""

from typing import Any

import pytest
import torch
from integer_nets import NETS, made
from torch import Tensor, fx, nn

from tersor.core.run import run
from tersor.model.graph import traced
from tersor.model.integer_edges import IntegerEdges
from tersor.model.integer_ops import why_no_kernel
from tersor.model.task import Task
from tersor.model.watch import input_names
from tersor.steps import Quantize


def choice(
    net: nn.Module, *inputs: Any, refused: frozenset[str] = frozenset(), **settings: Any
) -> IntegerEdges:
    weights = frozenset(name for name, item in net.named_parameters() if item.ndim > 1)
    return IntegerEdges(traced(net, inputs), input_names(net, inputs), weights, refused, **settings)


EDGES = {
    "residual": [
        "/input:x", "/relu:0", "/relu:1", "b/conv2d:0", "/relu:2", "/mean:0"
    ],
    "inverted": [
        "/input:x", "stem.1/hardtanh:0", "depth.0/conv2d:0", "/adaptive_avg_pool2d:0", "/relu:0",
        "excite/conv2d:0", "/mul:0", "/hardtanh:0", "/adaptive_avg_pool2d:1",  # hardswish * x is in float
    ],
    "branches": [
        "/input:x", "/relu:0", "/relu:1", "right/conv2d:0", "/cat:0", "last/conv2d:0", "/avg_pool2d:0",
        "/relu:2",
    ],
    "mlp": ["up/linear:0<0", "/gelu:0", "/mean:0"],  # the residual stream stays exact
    "shuffled": ["/input:x", "act/relu:0", "act/relu:1", "/cat:0", "act/relu:2"],
    "columns": ["/add:0", "/relu:0", "/mean:0"],
    "attended": [
        "qkv/linear:0<0", "qkv/linear:0", "/attention:0<softmax", "/attention:0", "/matmul:0<0",
        "/matmul:0<1", "/matmul:0",
    ],
}  # fmt: skip


LEFT = {
    "embed.weight": "add computes in float",
    "pooler.weight": "no output depends on it",
}  # of "columns"


@pytest.mark.parametrize("name", NETS)
def test_edges_by_hand(name: str) -> None:
    net, task = made(name)
    if name == "residual":
        net.norm = nn.Identity()
    found = choice(net, *task.example)
    assert found.edges == EDGES[name]
    weights = [item for item, tensor in net.named_parameters() if tensor.ndim > 1 and item not in LEFT]
    assert sorted(layer.weight for layer in found.layers) == sorted(weights)


def test_an_edge_that_no_grid_can_hold_takes_its_layer_with_it() -> None:
    net, task = made("branches")
    found = choice(net, *task.example, refused=frozenset({"right/conv2d:0"}))
    assert "right/conv2d:0" not in found.edges
    assert "/cat:0" in found.edges  # the last convolution still reads it
    assert found.edges == [edge for edge in EDGES["branches"] if edge != "right/conv2d:0"]


def test_weights_that_stay_in_float_have_a_reason() -> None:
    net, task = made("columns")
    found = choice(net, *task.example)
    assert {name: found.why_float(name) for name in LEFT} == LEFT
    embedding = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
    assert "looked up" in choice(embedding, torch.tensor([[1, 2]])).why_float("0.weight")
    lstm = choice(nn.LSTM(4, 3), torch.randn(2, 4))
    assert lstm.why_float("weight_ih_l0") == "lstm computes in float, except with activation_range=dynamic"
    gru = choice(nn.GRU(4, 3), torch.randn(2, 4))
    assert gru.why_float("weight_ih_l0") == "gru has no integer kernel"


def test_an_lstm_is_rounded_inside_where_ranges_are_dynamic() -> None:
    net = nn.Sequential(nn.LSTM(4, 3, 2, bidirectional=True))
    found = choice(net, torch.randn(5, 2, 4), dynamic=True)
    assert found.edges == ["0/lstm:0.0<all"]
    matrices = [name for name, tensor in net.named_parameters() if tensor.ndim > 1]
    assert sorted(layer.weight for layer in found.layers) == sorted(matrices)
    assert {(layer.edge, layer.op) for layer in found.layers} == {("0/lstm:0.0<all", "lstm")}
    assert not choice(net, torch.randn(5, 2, 4)).edges


class Computed(nn.Module):
    """An LSTM whose weight is computed when it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.r = nn.Parameter(torch.randn(12, 4)), nn.Parameter(torch.randn(12, 3))

    def forward(self, x: Tensor) -> Tensor:  # [T, B, 4]
        zeros = torch.zeros(1, x.shape[1], 3)
        return torch.lstm(x, (zeros, zeros), [self.w, self.r.tanh()], False, 1, 0.0, False, False, False)[0]


@pytest.mark.parametrize(
    ("net", "weight", "says"),
    [
        (nn.LSTM(4, 3, proj_size=2), "weight_ih_l0", "the integer kernel of lstm has no projections"),
        (Computed(), "w", "the weights of its lstm are computed"),
        (nn.GRU(4, 3), "weight_hh_l0", "gru has no integer kernel"),
        (nn.RNN(4, 3), "weight_hh_l0", "rnn_tanh has no integer kernel"),
    ],
)
def test_recurrent_layers_without_an_integer_kernel_have_a_reason(
    net: nn.Module, weight: str, says: str
) -> None:
    for moving in (True, False):
        found = choice(net, torch.randn(3, 2, 4), dynamic=moving)
        assert not found.edges
        assert found.why_float(weight) == says


def test_packed_sequences_have_no_integer_kernel() -> None:
    """No trace has them today, so by a graph made by hand."""
    graph = fx.Graph()
    data, sizes, h, c, w, r = map(graph.placeholder, ("data", "sizes", "h", "c", "w", "r"))
    settings = (False, 1, 0.0, False, False)
    packed = graph.call_function(torch.ops.aten.lstm.data, (data, sizes, [h, c], [w, r], *settings))
    whole = graph.call_function(torch.ops.aten.lstm.input, (data, [h, c], [w, r], *settings, False))
    assert why_no_kernel(packed, {w, r}) == "the integer kernel of lstm takes no packed sequences"
    assert not why_no_kernel(whole, {w, r})


def test_all_matrices_of_an_lstm_are_integers_or_none() -> None:
    net, x = nn.LSTM(4, 3), torch.randn(3, 2, 4)
    found = IntegerEdges(traced(net, (x,)), input_names(net, (x,)), frozenset({"weight_ih_l0"}), dynamic=True)
    assert not found.edges
    assert "not chosen, or no integers" in found.why_float("weight_ih_l0")


class Ends(nn.Module):
    """A layer that reads the last state, and one that reads the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.state, self.output = nn.LSTM(4, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:  # [T, B, 4]
        y, (h, c) = self.cell(x)
        return self.state(h[-1]) + self.output(y) + c.mean()


def test_each_output_of_a_recurrent_layer_is_an_edge_of_its_own() -> None:
    found = choice(Ends(), torch.randn(3, 2, 4))
    assert found.edges == ["cell/lstm:0.0", "cell/lstm:0.1"]
    edges = {layer.weight: layer.edge for layer in found.layers}
    assert edges == {"state.weight": "cell/lstm:0.1", "output.weight": "cell/lstm:0.0"}


class Unlisted(nn.Module):
    """Operators whose outputs are no edges by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.sin(self.conv(x.abs())).flip(1))


def test_layers_that_read_what_has_no_name_get_a_grid_of_their_own() -> None:
    found = choice(Unlisted(), torch.randn(2, 4, 3, 3))
    assert found.edges == ["conv/conv2d:0<0", "conv/conv2d:0", "head/conv2d:0<0", "head/conv2d:0"]
    assert [layer.edge for layer in found.layers] == ["conv/conv2d:0<0", "head/conv2d:0<0"]


class Twice(nn.Module):
    """A layer with weights that runs twice: both calls share names, and so grids."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(self.conv(x)))


def test_all_calls_of_a_shared_layer_are_integers() -> None:
    found = choice(Twice(), torch.randn(2, 4, 3, 3))
    assert found.edges == ["/input:x", "conv/conv2d:0", "head/conv2d:0"]
    assert [layer.weight for layer in found.layers] == ["conv.weight", "conv.weight", "head.weight"]


class Scores(nn.Module):
    """Attention in its own words: a product of activations, a scale, a mask, softmax, a second product."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).transpose(1, 2) / 3 + mask
        return scores.softmax(2) @ self.v(x)


def test_products_of_activations_are_integers_and_the_mask_stays_out() -> None:
    net, x = Scores(), torch.randn(2, 4, 8)
    mask = torch.full((4, 4), torch.finfo(torch.float32).min).triu(1)
    found = choice(net, x, mask)
    assert found.edges == ["/input:x", "q/linear:0", "k/linear:0", "/softmax:0", "v/linear:0"]
    assert [layer.edge for layer in found.layers] == ["/input:x"] * 3


def test_arguments_are_named_as_a_run_names_them() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, pair: dict[str, Tensor], *rest: Tensor) -> Tensor:
            return self.a(pair["left"]) + self.b(rest[1])

    left, right, a, b = (torch.randn(2, 4) for _ in range(4))
    found = choice(Nested(), {"left": left, "right": right}, a, b)
    assert found.edges == ["/input:pair.left", "/input:rest.1"]


class Spectrum(nn.Module):
    """A product of complex numbers, as of spectral layers, and one of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3)
        self.mix = nn.Parameter(torch.randn(5, 5, dtype=torch.complex64) / 3)
        self.code = nn.Parameter(torch.arange(64).reshape(8, 8) % 3, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        waves = torch.fft.irfft(torch.fft.rfft(self.first(x)) @ self.mix, n=8)
        return self.last(waves + (x > 0).long() @ self.code)


@pytest.mark.parametrize("ranges", ["minmax", "dynamic"])
def test_products_of_complex_numbers_and_of_integers_stay_as_they_are(ranges: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x, net = torch.randn(16, 8), Spectrum().eval()
    task = Task("x", evaluate=[(x, x[:, :3].argmax(1))], calibrate=[(x,)])
    small = run(net, Quantize(activations=8, activation_range=ranges), task)
    assert torch.equal(small.state_dict()["mix"], net.mix)
    assert (small.model()(x) - net(x)).abs().max() < 0.05 * net(x).abs().max()
