"""Graph: edges, constants and unread tensors, compared with runs of the model."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from nets import floats, nets
from tiny import MODELS, tiny
from torch import Tensor, nn

from tersor.errors import RefusedError
from tersor.model.edges import edges_of
from tersor.model.graph import Graph, op_name, traced, value, values, written

CALLS = {
    **{f"tiny {name}": lambda name=name: (tiny(name).model, (tiny(name).x,), {}) for name in MODELS},
    **{name: lambda name=name: nets()[name] for name in ("resnet20", "gpt", "residual", "branch")},
}
each_net = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def graph_of(call: Callable[[], Any]) -> tuple[nn.Module, Graph, Callable[[nn.Module], list[Tensor]]]:
    """(model, its graph, a function that runs the model on the same inputs)."""
    model, args, kwargs = call()

    def answers(net: nn.Module) -> list[Tensor]:
        with torch.no_grad():
            return floats(net(*copy.deepcopy(args), **copy.deepcopy(kwargs)))

    return model, traced(model, kwargs or args), answers


@each_net
def test_edges_equal_those_of_a_run(call: Callable[[], Any]) -> None:
    model, args, kwargs = call()
    run = {name: edge for name, edge in edges_of(model, *args, **kwargs).items() if edge.op != "input"}
    found = traced(model, kwargs or args).edges
    assert list(found) == list(run)
    for name, (node, which) in found.items():
        made = value(node) if which is None else value(node)[which]
        if run[name].uses == 1:
            assert (tuple(made.shape), str(made.dtype)) == (run[name].shape, f"torch.{run[name].dtype}")


@each_net
def test_changes_to_unread_tensors_change_no_output(call: Callable[[], Any]) -> None:
    model, graph, answers = graph_of(call)
    before = answers(model)
    names = {name for name, t in model.state_dict().items() if t.is_floating_point() and t.numel()}
    for name in sorted(names & set(graph.tensors.values())):
        changed = copy.deepcopy(model)
        tensor = dict(changed.named_parameters()) | dict(changed.named_buffers())
        with torch.no_grad():
            tensor[name].copy_(torch.rand(tensor[name].shape) + 0.5)
        moved = any(not torch.equal(a, b) for a, b in zip(before, answers(changed), strict=True))
        assert moved != (name in graph.unread), name


def test_tensors_of_a_branch_for_training_are_unread() -> None:
    _, graph, _ = graph_of(CALLS["branch"])
    assert graph.unread == {"aux.weight", "aux.bias"}


class Writes(nn.Module):
    """Writes into a view of a zero tensor, reads the tensor itself, and has a constant path."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
        self.fixed, self.lost = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:  # [4]
        kept = torch.zeros(2, 4)
        kept[0].copy_(self.first)
        kept[1].add_(x)
        self.lost * 2
        return kept.sum(0) + self.second.exp() * self.fixed.neg()


def test_a_tensor_that_is_written_in_place_is_read_and_not_constant() -> None:
    graph = traced(Writes(), (torch.randn(4),))
    assert graph.unread == {"lost"}
    names = {op_name(node) for node in graph.constant}
    assert {"exp", "neg", "mul"} <= names
    writers = [node for node in graph.nodes if written(node)]
    assert {op_name(node) for node in writers} == {"copy_", "add_"}
    assert [node for node in writers if op_name(node) == "add_" and node in graph.constant] == []
    summed = next(node for node in graph.nodes if op_name(node) == "sum")
    assert summed not in graph.constant


def test_constants_do_not_depend_on_the_input() -> None:
    """Compares the graph's values for two inputs."""
    for name in ("mlp", "attention", "conv"):
        t = tiny(name)
        graph, others = traced(t.model, (t.x,)), {}
        for x in (t.x, t.x.flip(0).roll(1, -1)):
            run = Recorder(graph.program.module())
            run.run(x)
            for node, made in run.made.items():
                others.setdefault(node, []).append(made)
        moved = {n for n, (a, b) in others.items() if not all(map(torch.equal, a, b))}
        assert moved
        assert moved.isdisjoint({node.name for node in graph.constant})


class Recorder(torch.fx.Interpreter):
    def __init__(self, module: Any):
        super().__init__(module)
        self.made: dict[str, list[Tensor]] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        out = super().run_node(n)
        if n.op == "call_function":
            parts = out if isinstance(out, (tuple, list)) else [out]
            self.made[n.name] = [part.clone() for part in parts if isinstance(part, Tensor)]
        return out


def test_tied_tensors_have_their_first_name() -> None:
    t = tiny("attention")
    graph = traced(t.model, (t.x,))
    assert "head.weight" not in graph.tensors.values()
    assert "embed.weight" in graph.tensors.values()
    assert "embed.weight" not in graph.unread
    assert graph.path(next(node for node in graph.nodes if op_name(node) == "embedding")) == "embed"


def test_a_module_with_two_names_has_the_first() -> None:
    model, args, _ = nets()["residual"]
    graph = traced(model, args)
    convs = [graph.path(node) for node in graph.nodes if op_name(node) == "conv2d"]
    assert convs == ["stem", "twice.0", "twice.0", "twice.0"]


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Breaks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise TypeError("this network has lost its head")


@pytest.mark.parametrize(("model", "says"), [(Branches(), "data-dependent"), (Breaks(), "lost its head")])
def test_a_model_that_cannot_be_traced_is_refused_with_the_reason(model: nn.Module, says: str) -> None:
    with pytest.raises(RefusedError, match="torch.export cannot trace the model: ") as caught:
        traced(model, (torch.randn(3),))
    assert says in str(caught.value)


class Picks(nn.Module):
    """The size of the output depends on the values, as with a detector's boxes."""

    def forward(self, x: Tensor) -> Tensor:
        found = x[x > 0]
        return found * 2 if found.numel() > 4 else found


def test_a_refusal_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RefusedError, match="Could not"):
        traced(Picks(), (torch.randn(8, 8),))
    assert capfd.readouterr() == ("", "")


def test_the_model_and_random_state_do_not_change() -> None:
    t = tiny("conv")
    t.model.train()
    before, random = copy.deepcopy(t.model.state_dict()), torch.get_rng_state()
    traced(t.model, (t.x,))
    assert all(module.training for module in t.model.modules())
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), t.model.state_dict().values(), strict=True))
    assert all(module._forward_pre_hooks == {} for module in t.model.modules())


class Cache:
    """An output of a class that torch.export does not know."""

    def __init__(self, x: Tensor):
        self.x = x


@dataclass
class Own:
    logits: Tensor
    cache: Cache


class Cached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Own:
        return Own(self.model(x), Cache(x))


def test_outputs_of_unknown_classes_are_opened_and_names_stay() -> None:
    """A submodule called "model" keeps its name."""
    graph = traced(Cached(), {"x": torch.randn(4, 3)})
    assert sorted(graph.tensors.values()) == ["model.bias", "model.weight"]
    assert list(graph.edges) == ["model/linear:0"]
    assert [tuple(made.shape) for node in graph.output.all_input_nodes for made in values(node)] == [(4, 2)]
    assert len(graph.inputs) == 1
