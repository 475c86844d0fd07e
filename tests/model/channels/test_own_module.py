"""Own module: the user's module is cut as the graph says; what its code does not allow is found by trial."""

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from channel_toys import TOYS, apart, prepared, randomized, relu, some_units, tensors_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from tersor.core.apply import apply
from tersor.core.state import start
from tersor.model.channels import costs
from tersor.model.channels.groups import walked
from tersor.model.channels.own_module import OwnModule
from tersor.model.channels.run_graph import GraphRun
from tersor.model.program_builder import program_of
from tersor.record.events import Cut, Group


def own(model: nn.Module, inputs: Any, exact: bool = True) -> OwnModule:
    """As slim makes it, of a model with random norms."""
    torch.manual_seed(0)
    state = start(randomized(prepared(model)))

    def build(cuts: Any, sets: Any) -> nn.Module:
        events = [Cut(name, axis, tuple(int(k) for k in kept)) for (name, axis), kept in cuts.items()]
        return apply(state, Group("trial", (*events, *sets)), "toy")[0].plain()

    return OwnModule(walked(state.plain(), inputs, set(state.forms)), inputs, build, exact)


def sizes(groups: Any) -> dict[str, int]:
    return {family.name: family.size for family in groups.families}


def cut_is_right(one: OwnModule, groups: Any, seed: int) -> tuple[nn.Module, Any]:
    """A random cut of the user's module gives what the cut graph gives; (the cut module, what is gone)."""
    gone = some_units(groups, seed)
    plan = one.plan(groups, gone)
    assert one.check(groups, gone, plan) is None
    model = one.build(plan.cuts, plan.sets)
    for (name, axis), kept in plan.cuts.items():
        assert tensors_of(model)[name].shape[axis] == len(kept)
    with torch.no_grad():
        found = tree_leaves(one.called(model))
    wanted = GraphRun(groups, gone, cut=True).outputs(one.tensors, tree_leaves(one.inputs))
    assert apart(found, wanted) < 1e-5
    return model, gone


# The toys whose code has no number of its own. The others have literals, and what they leave is stated below.
FREE = ["squeeze_excite", "depthwise", "dilated_groups", "transposed", "dense_cat", "conv3d", "flattened",
        "layer_scale", "group_norm", "instance_norm", "many_slopes", "spectral_norm", "pixel_shuffle", "glu",
        "gated_by_chunk", "encoder_layer", "tied_embedding", "lstm", "gru", "named",
        "shared_twice"]  # fmt: skip


@pytest.mark.parametrize("name", FREE)
def test_code_without_literals_allows_all(name: str) -> None:
    toy = TOYS[name]
    one = own(toy.make(), toy.inputs(), exact=False)
    groups = one.fit()
    assert one.faults == []
    assert sizes(groups) == toy.every
    model, gone = cut_is_right(one, groups, seed=5)
    counts = [int((~gone[family.units]).sum()) for family in groups.families]
    left = sum(x.numel() for x in model.parameters())
    assert costs.parameters(groups, groups.families).total(counts) == left


WITH_GRAPHS = ("autocast_region",)  # refused: tests/model/test_program.py
# Of two chunks one may become narrower in a program, which has sizes where the code has a number of chunks.
UNEVEN = {"uneven_chunk": [2, 3, 9]}


@pytest.mark.sampled(name=("dense_cat", "encoder_layer", "grouped_queries", "lstm"))
@pytest.mark.parametrize("name", [name for name in TOYS if name not in WITH_GRAPHS])
def test_a_program_allows_all_that_the_graph_does(name: str) -> None:
    toy = TOYS[name]
    inputs = toy.inputs()
    args, named = ((), inputs) if isinstance(inputs, dict) else (tuple(inputs), {})
    program = program_of(torch.export.export(toy.model().eval(), args, named, strict=False))
    one = own(program, inputs, exact=False)
    groups = one.fit()
    assert one.faults == []
    assert sorted(sizes(groups).values()) == UNEVEN.get(name, sorted(toy.every.values()))
    if groups.families:
        cut_is_right(one, groups, seed=5)


def test_a_grouped_convolution_by_the_code_has_no_layer_whose_groups_are_set() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.out, self.parts = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1), 4
            self.weight = nn.Parameter(torch.randn(8, 2, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.out(F.conv2d(self.into(x).relu(), self.weight, None, 1, 1, 1, self.parts).relu())

    one = own(Grouped(), (torch.randn(2, 3, 5, 5),))
    groups = one.fit()
    assert one.faults == []
    model, gone = cut_is_right(one, groups, seed=1)
    assert model.parts == 4 - int(gone.any()) or model.parts < 4


LITERALS = {
    # toy: (families that are left, modules at fault)
    "slice_assignment": {},
    "einsum_attention": {},
}


@pytest.mark.parametrize("name", LITERALS)
def test_code_with_literals_keeps_them(name: str) -> None:
    toy = TOYS[name]
    one = own(toy.make(), toy.inputs())
    groups = one.fit()
    assert sizes(groups) == LITERALS[name]
    assert one.faults
    assert {fault.path for fault in one.faults} == {""}


class Heads(nn.Module):
    """Attention whose code can follow a cut of heads."""

    def __init__(self, d: int, heads: int, inner: int):
        super().__init__()
        self.heads, self.inner = heads, inner
        self.qkv, self.out = nn.Linear(d, 3 * inner), nn.Linear(inner, d)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, self.inner // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.out(x.transpose(1, 2).reshape(b, n, self.inner))


class Literal(Heads):
    """The number of heads is written in the code."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 4, 3).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.out(x.transpose(1, 2).flatten(2))


class FromInput(Heads):
    """The width of the heads' outputs is taken from the input, as in DeiT before its heads may be cut."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, self.inner // self.heads).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.out(x.transpose(1, 2).reshape(b, n, c))


class Scaled(Heads):
    """Neurons of a head's width are cut where heads cannot be: the mix over heads is by position. The scale
    follows the width that is left."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, self.inner // self.heads).permute(2, 0, 3, 1, 4)
        weights = (q.flip(1) @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(b, n, self.inner))


class Block(nn.Module):
    def __init__(self, attention: nn.Module):
        super().__init__()
        self.into, self.attention = nn.Linear(6, 12), attention
        self.up, self.down, self.head = nn.Linear(12, 9), nn.Linear(9, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        x = x + self.attention(x)
        x = x + self.down(relu(self.up(x)))
        return self.head(x)


TOKENS = (torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(3)),)


def test_attributes_follow() -> None:
    one = own(Block(Heads(12, 4, 12)), TOKENS)
    groups = one.fit()
    assert one.faults == []
    assert sizes(groups) == {"into.weight:0": 12, "attention.qkv.weight:0": 4, "up.weight:0": 9}
    model, gone = cut_is_right(one, groups, seed=1)
    left = int((~gone[groups.families[1].units]).sum())
    assert (model.attention.heads, model.attention.inner) == (left, 3 * left)
    assert left < 4


@pytest.mark.parametrize(
    ("attention", "says"),
    [
        (Literal(12, 4, 12), "shape '.*' is invalid|has shape"),
        (FromInput(12, 6, 12), "shape '.*' is invalid|has shape"),
        (Scaled(12, 4, 12), "other values"),
    ],
    ids=["literal", "width of the input", "scale"],
)
def test_a_fault_names_the_module_and_the_rest_is_cut(attention: Heads, says: str) -> None:
    one = own(Block(attention), TOKENS)
    assert sizes(one.groups()).keys() == {"into.weight:0", "attention.qkv.weight:0", "up.weight:0"}
    groups = one.fit()
    assert {fault.path for fault in one.faults} == {"attention"}
    assert all(re.search(says, fault.why) for fault in one.faults), one.faults
    assert sizes(groups)["up.weight:0"] == 9
    assert "attention.qkv.weight:0" not in sizes(groups)
    assert any("fixes" in text for text in groups.why_frozen("attention.qkv.weight", 0))
    for seed in range(3):
        cut_is_right(one, groups, seed)


def test_the_stream_lives_where_only_the_heads_are_fixed() -> None:
    one = own(Block(Literal(12, 4, 12)), TOKENS)
    assert sizes(one.fit()) == {"into.weight:0": 12, "up.weight:0": 9}


def test_two_modules_of_a_class_are_at_fault_together() -> None:
    """One attempt for both; another class keeps its heads."""
    blocks = nn.Sequential(Heads(6, 4, 12), Literal(6, 4, 12), Literal(6, 4, 12), nn.Linear(6, 3))
    one = own(blocks, TOKENS)
    groups = one.fit()
    assert len(one.faults) == 1
    assert one.faults[0].path == "1"
    assert sizes(groups)["0.qkv.weight:0"] == 4
    assert not {"1.qkv.weight:0", "2.qkv.weight:0"} & sizes(groups).keys()
    cut_is_right(one, groups, 0)


def test_an_operator_without_a_rule_freezes_by_name() -> None:
    toy = TOYS["no_rule"]
    one = own(toy.make(), toy.inputs())
    groups = one.fit()
    assert one.faults == []
    assert sizes(groups) == {"c.weight:0": 9}
    assert groups.why_frozen("a.weight", 0) == {"no rule for topk": 8}
    assert one.walk.unknown == {"topk": 1}


class Region(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 9), nn.Linear(9, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = relu(self.a(x))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.b(x).tanh()
        return self.head(x.float())


def test_a_region_of_lower_precision() -> None:
    """The graph runs it in that precision too, so that the module is not taken for another function."""
    one = own(Region(), (torch.randn(4, 6),))
    groups = one.fit()
    assert one.faults == []
    assert sizes(groups) == {"a.weight:0": 9, "b.weight:0": 8}
    cut_is_right(one, groups, 2)


def test_a_wrong_plan_is_found() -> None:
    """Other indices than those that are gone, and a tensor that is forgotten."""
    one = own(Block(Heads(12, 4, 12)), TOKENS)
    groups = one.fit()
    gone = some_units(groups, 0)
    plan = one.plan(groups, gone)
    assert one.check(groups, gone, plan) is None
    kept = plan.cuts["up.weight", 0]
    other = np.setdiff1d(np.arange(9), kept)
    swapped = np.sort(np.concatenate([kept[1:], other[:1]]))
    fault = one.check(groups, gone, plan._replace(cuts={**plan.cuts, ("up.weight", 0): swapped}))
    assert fault is not None
    assert "other values" in fault.why
    fault = one.check(groups, gone, plan._replace(sets=[]))
    assert fault is not None
    assert fault.path == "attention"
