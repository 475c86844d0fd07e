"""Edges: a run, the exported graph and training must have the same names for the same tensors."""

import copy
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from exported import named_nodes
from nets import benched, nets
from tiny import MODELS, tiny
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import RefusedError, SiteError
from tersor.model.edges import Edge, check_same_in_training, edges_of, known, parse
from tersor.model.graph import traced
from tersor.model.ops import LISTED
from tersor.model.watch import WatchedRun, active, hooked, running

CALLS = {
    **{f"tiny {name}": lambda name=name: (tiny(name).model, (tiny(name).x,), {}) for name in MODELS},
    **{name: lambda name=name: nets()[name] for name in nets()},
    **{f"trained {name}": lambda name=name: benched(name) for name in ("resnet20", "tinygpt")},
    "encoder": lambda: (encoder(), (torch.randn(2, 5, 8),), {}),
}
SMALL = tuple(call for name, call in CALLS.items() if name != "resnet20" and not name.startswith("trained"))
each_net = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()


def compared(model: nn.Module, args: Any, kwargs: Any) -> dict[str, Edge]:
    """The edges of a model, compared with the exported graph: names, order, uses, shapes."""
    edges = {name: edge for name, edge in edges_of(model, *args, **kwargs).items() if edge.op != "input"}
    nodes = named_nodes(torch.export.export(model, args, kwargs), model)
    assert list(edges) == list(dict.fromkeys(name for name, _, _ in nodes))
    assert {name: edge.uses for name, edge in edges.items()} == Counter(name for name, _, _ in nodes)
    for name, node, j in reversed(nodes):
        value = node.meta["val"] if j is None else node.meta["val"][j]
        assert edges[name].dtype == str(value.dtype).removeprefix("torch.")
        if edges[name].uses == 1:
            assert edges[name].shape == tuple(value.shape)
    return edges


@pytest.mark.sampled(call=SMALL)
@each_net
def test_names_equal_those_of_the_exported_graph(call: Callable[[], Any]) -> None:
    assert compared(*call())


class Of(nn.Module):
    """A module that calls one function twice, so that a wrong count gives a wrong second name."""

    def __init__(self, func: Callable[..., Any], *parts: nn.Module):
        super().__init__()
        self.func, self.parts = func, nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Any:
        return self.func(x, *self.parts), self.func(x, *self.parts), x.relu()


KERNEL = torch.ones(3, 3)
V, LINE, IMAGE, BLOCK = (torch.randn(shape) for shape in ((3, 3), (2, 3, 4), (2, 3, 4, 4), (1, 3, 4, 4, 4)))

# For each listed operator: its name, a function that calls it, its input.
SPELLINGS: list[tuple[str, Callable[..., Any], Tensor]] = [
    ("linear", lambda x: F.linear(x, KERNEL), V),
    ("conv1d", lambda x: F.conv1d(x, torch.ones(2, 3, 1)), LINE),
    ("conv2d", lambda x: F.conv2d(x, torch.ones(2, 3, 3, 3), padding="same"), IMAGE),
    ("conv3d", lambda x: F.conv3d(x, torch.ones(2, 3, 1, 1, 1)), BLOCK),
    ("conv_transpose1d", lambda x: F.conv_transpose1d(x, torch.ones(3, 2, 1)), LINE),
    ("conv_transpose2d", lambda x: F.conv_transpose2d(x, torch.ones(3, 2, 1, 1)), IMAGE),
    ("conv_transpose3d", lambda x: F.conv_transpose3d(x, torch.ones(3, 2, 1, 1, 1)), BLOCK),
    ("matmul", lambda x: x @ x, V),
    ("matmul", lambda x: x.mm(x), V),
    ("matmul", lambda x: torch.bmm(x, x.mT), LINE),
    ("addmm", lambda x: torch.addmm(x, x, x), V),
    ("baddbmm", lambda x: torch.baddbmm(x @ x.mT, x, x.mT), LINE),
    ("einsum", lambda x: torch.einsum("ij,jk->ik", x, x), V),
    ("attention", lambda x: F.scaled_dot_product_attention(x, x, x), IMAGE),
    ("add", lambda x: 1 + x, V),
    ("add", lambda x: x.clone().add_(x), V),
    ("sub", lambda x: x - x, V),
    ("sub", lambda x: x.subtract(1), V),
    ("rsub", lambda x: 1 - x, V),
    ("rsub", lambda x: torch.rsub(x, 1), V),
    ("mul", lambda x: 2 * x, V),
    ("mul", lambda x: torch.multiply(x, x), V),
    ("div", lambda x: x / 2, V),
    ("div", lambda x: x.true_divide(x), V),
    ("reciprocal", lambda x: 1 / x, V),
    ("reciprocal", lambda x: x.reciprocal(), V),
    ("cat", lambda x: torch.concat([x, x]), V),
    ("stack", lambda x: torch.stack([x, x]), V),
    ("where", lambda x: torch.where(x > 0, x, 0.0), V),
    ("pow", lambda x: x**2, V),
    ("pow", lambda x: 2**x, V),
    ("rsqrt", lambda x: x.rsqrt(), V),
    ("mean", lambda x: x.mean(0), V),
    ("sum", lambda x: x.sum(), V),
    ("relu", lambda x: F.relu(x.clone(), inplace=True), V),
    ("hardtanh", F.relu6, V),
    ("hardtanh", F.hardtanh, V),
    ("clamp", lambda x: x.clip(0, 1), V),
    ("leaky_relu", F.leaky_relu, V),
    ("elu", F.elu, V),
    ("silu", F.silu, V),
    ("hardswish", F.hardswish, V),
    ("hardsigmoid", F.hardsigmoid, V),
    ("mish", F.mish, V),
    ("sigmoid", lambda x: x.sigmoid(), V),
    ("tanh", torch.tanh, V),
    ("softplus", F.softplus, V),
    ("glu", lambda x: F.glu(x, -1), LINE),
    ("gelu", F.gelu, V),
    ("prelu", lambda x: F.prelu(x, torch.ones(1)), V),
    ("softmax", lambda x: F.softmax(x, 1), V),
    ("softmax", lambda x: x.softmax(1), V),
    ("max_pool1d", lambda x: F.max_pool1d(x, 2), LINE),
    ("max_pool2d", lambda x: F.max_pool2d(x, 2), IMAGE),
    ("max_pool2d", lambda x: F.max_pool2d(x, 2, return_indices=True), IMAGE),
    ("max_pool3d", lambda x: F.max_pool3d(x, 2), BLOCK),
    ("avg_pool1d", lambda x: F.avg_pool1d(x, 2), LINE),
    ("avg_pool2d", lambda x: F.avg_pool2d(x, 2), IMAGE),
    ("avg_pool3d", lambda x: F.avg_pool3d(x, 2), BLOCK),
    ("adaptive_avg_pool1d", lambda x: F.adaptive_avg_pool1d(x, 2), LINE),
    ("adaptive_avg_pool2d", lambda x: F.adaptive_avg_pool2d(x, 2), IMAGE),
    ("adaptive_avg_pool3d", lambda x: F.adaptive_avg_pool3d(x, 2), BLOCK),
    ("interpolate", lambda x: F.interpolate(x, scale_factor=2), IMAGE),
    ("interpolate", lambda x: F.interpolate(x, size=3, mode="bilinear", antialias=True), IMAGE),
    ("adaptive_avg_pool2d", lambda x: F.interpolate(x, size=2, mode="area"), IMAGE),
    ("layer_norm", lambda x: F.layer_norm(x, (3,)), V),
    ("group_norm", lambda x: F.group_norm(x, 3), LINE),
    ("rms_norm", lambda x: F.rms_norm(x, (3,)), V),
    ("batch_norm", lambda x: F.batch_norm(x, torch.zeros(3), torch.ones(3)), V),
    ("instance_norm", F.instance_norm, LINE),
    ("embedding", lambda x: F.embedding(torch.tensor([0, 2]), x), V),
    # Python functions that call other operators, which have their own names.
    ("softmax", lambda x: F.softmin(x, 1), V),
    ("add", F.softsign, V),
    ("sub", F.tanhshrink, V),
    ("div", F.normalize, V),
    ("div", lambda x: F.local_response_norm(x, 2), IMAGE),
    ("avg_pool2d", lambda x: F.lp_pool2d(x, 2.0, 2), IMAGE),
    ("avg_pool1d", lambda x: F.lp_pool1d(x, 2.0, 2), LINE),
    ("softmax", F.gumbel_softmax, V),
]
CELLS: list[tuple[str, nn.Module, Tensor]] = [
    ("lstm", nn.LSTM(4, 3), LINE),
    ("gru", nn.GRU(4, 3, bidirectional=True), LINE),
    ("rnn_tanh", nn.RNN(4, 3), LINE),
    ("rnn_relu", nn.RNN(4, 3, nonlinearity="relu"), LINE),
    ("lstm_cell", nn.LSTMCell(3, 2), V),
    ("gru_cell", nn.GRUCell(3, 2), V),
    ("rnn_tanh_cell", nn.RNNCell(3, 2), V),
    ("rnn_relu_cell", nn.RNNCell(3, 2, nonlinearity="relu"), V),
]


@pytest.mark.parametrize(("op", "func", "x"), SPELLINGS, ids=[f"{n} {s[0]}" for n, s in enumerate(SPELLINGS)])
def test_each_spelling_of_an_operator_has_the_same_name_in_both(
    op: str, func: Callable[..., Any], x: Tensor
) -> None:
    edges = compared(Of(func).eval(), (x.clone(),), {})
    assert {edge.name.split(".")[0] for edge in edges.values() if edge.op == op} >= {f"/{op}:0", f"/{op}:1"}


@pytest.mark.parametrize(("op", "cell", "x"), CELLS, ids=[cell[0] for cell in CELLS])
def test_recurrent_layers_have_edges(op: str, cell: nn.Module, x: Tensor) -> None:
    edges = compared(nn.Sequential(cell).eval(), (x,), {})
    assert {edge.op for edge in edges.values()} == {op}
    assert next(iter(edges)).startswith(f"0/{op}:0")


def test_every_listed_operator_is_spelled_here() -> None:
    assert {op for op, *_ in [*SPELLINGS, *CELLS]} == set(LISTED)


# --- the fields of an edge ---


def test_an_edge_has_path_operator_shape_and_uses() -> None:
    model, args, kwargs = nets()["residual"]
    edges = edges_of(model, *args, **kwargs)
    assert edges["/input:x"] == Edge("/input:x", (3, 1, 6, 6), "float32", 1)
    assert edges["stem/conv2d:0"] == Edge("stem/conv2d:0", (3, 6, 6, 6), "float32", 1)
    assert edges["twice.0/conv2d:0"].uses == 3  # two calls in the loop and one by the alias
    assert (edges["/add:0"].path, edges["/add:0"].op) == ("", "add")
    assert list(edges)[-2:] == ["/sub:0", "head/linear:0"]


def test_inputs_have_names_from_the_signature() -> None:
    model, args, kwargs = nets()["nested"]
    edges = edges_of(model, *args, **kwargs)
    assert [name for name in edges if edges[name].op == "input"] == [
        "/input:pair.0", "/input:pair.1", "/input:extra.bias"
    ]  # fmt: skip
    inputs = [name for name in edges_of(nets()["gpt"][0], **nets()["gpt"][2]) if name.startswith("/input")]
    assert inputs == []  # tokens are not floats


def test_listing_edges_changes_nothing() -> None:
    model, args, kwargs = nets()["residual"]
    model.train()
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    edges_of(model, *args, **kwargs)
    check_same_in_training(model, ["stem/conv2d:0"], lambda net: net(*args, **kwargs))
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    "name",
    [
        "stem",
        "stem/conv2d",
        "stem/view:0",
        "stem/conv2d:x",
        "input:x",
        "a/input:x",
        "/input:",
        # No run meets these, and a grid there would round nothing.
        "stem/conv2d:0<all",
        "stem/conv2d:0<",
        "stem/add:0<0",
        "cell/lstm:0.0<0",
        "a/attention:0<all",
        "cell/lstm:0.0<softmax",
        "cell/gru:0.0<all",
    ],  # fmt: skip
)
def test_a_name_that_is_not_an_edge_is_refused(name: str) -> None:
    with pytest.raises(SiteError, match="is no edge name"):
        parse(name)


@pytest.mark.parametrize(
    "name", ["a.b/conv2d:0", "/linear:0<0", "a/attention:0<softmax", "a/attention:1<2", "cell/lstm:0.0<all"]
)
def test_a_name_of_an_edge_or_of_what_one_operator_reads(name: str) -> None:
    path, op = parse(name)
    assert name.startswith(f"{path}/{op}:")


def test_an_unknown_edge_has_near_misses() -> None:
    model, args, kwargs = nets()["residual"]
    with pytest.raises(
        SiteError, match=r"eval: the model has no edge 'stem/conv2d:1'; did you mean 'stem/conv2d:0'"
    ):
        known(edges_of(model, *args, **kwargs), ["stem/conv2d:1"], "eval")


# --- training ---


@each_net
def test_names_are_the_same_in_training_except_after_branches(call: Callable[[], Any]) -> None:
    model, args, kwargs = call()
    names = [name for name, edge in edges_of(model, *args, **kwargs).items()]
    if model.__class__.__name__ == "Branch":
        names.remove("/add:0")
    check_same_in_training(model, names, lambda net: net(*args, **kwargs))


def test_an_edge_with_another_name_in_training_is_refused() -> None:
    model, args, kwargs = nets()["branch"]
    with pytest.raises(RefusedError, match=r"/add:0: the model itself runs other operators in training"):
        check_same_in_training(model, ["first/linear:0", "/add:0"], lambda net: net(*args, **kwargs))
    check_same_in_training(model, ["/input:x", "second/linear:0"], lambda net: net(*args, **kwargs))


# --- the run itself ---


def names_seen(net: nn.Module, *args: Any, **kwargs: Any) -> list[str]:
    seen: list[str] = []
    with running(WatchedRun(lambda name, x: seen.append(name) or x)):
        net(*args, **kwargs)
    return seen


def test_an_error_leaves_nothing_behind() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("mine")

    class Catches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fails, self.last = Fails(), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            try:
                self.fails(x)
            except ValueError:
                x = x + 1
            return self.last(x) + x

    assert names_seen(hooked(Catches()), torch.ones(1, 2)) == ["/add:0", "last/linear:0", "/add:1"]
    with pytest.raises(ValueError, match="mine"):
        names_seen(hooked(Fails()), torch.ones(1, 2))
    assert active() is None
    assert not torch._C._len_torch_function_stack()


def test_two_threads_do_not_see_each_other() -> None:
    calls = [nets()["gpt"], nets()["resnet20"]]
    want = [names_seen(hooked(copy.deepcopy(model)), *args, **kwargs) for model, args, kwargs in calls]
    got: list[Any] = [None, None]
    start = threading.Barrier(2)

    def work(i: int) -> None:
        model, args, kwargs = calls[i]
        net = hooked(copy.deepcopy(model))
        start.wait()
        got[i] = [names_seen(net, *args, **kwargs) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [[want[0]] * 20, [want[1]] * 20]


class OneRelu(nn.Module):
    """One activation for several layers, also inside a layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()
        self.inner = nn.Sequential(nn.Linear(4, 4), self.act, nn.Linear(4, 4), self.act)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.act(self.inner(self.act(x))))


def test_calls_of_a_module_without_tensors_are_counted_over_a_call_of_its_parent() -> None:
    found = edges_of(OneRelu(), torch.randn(2, 4))
    uses = {name: edge.uses for name, edge in found.items() if edge.op == "relu"}
    # The first calls of the model and of its inner part share a name, as the second ones do.
    assert uses == {"act/relu:0": 3, "act/relu:1": 3}
    assert list(traced(OneRelu(), (torch.randn(2, 4),)).edges) == list(found)[1:]
