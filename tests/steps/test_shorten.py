"""Shorten: branches are really gone, the rest computes what it computes with zeros in their place, by hand;
the choice, the budget, refitting, files, undo, training and exports work."""

import copy
import itertools
import shutil
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from solved import solved
from tiny import tiny
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tersor.check import check
from tersor.core.history import replay, undo
from tersor.core.recipe import Recipe
from tersor.core.run import run
from tersor.core.state import State
from tersor.errors import RefusedError, SettingError
from tersor.io.container import load
from tersor.io.container_writer import save
from tersor.model.task import Task
from tersor.steps import Cluster, Entropy, Finetune, Fold, Prune, Quantize, Shorten, Slim

CLASSES = 4


class Block(nn.Module):
    """relu(x + f(x)), as in ResNet: with a relu before it, without f it is x."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.a, self.na = nn.Conv2d(width, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner)
        self.b, self.nb = nn.Conv2d(inner, width, 3, padding=1), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.nb(self.b(self.relu(self.na(self.a(x)))))
        y += x
        return self.relu(y)


class Down(nn.Module):
    """A shortcut with a layer of its own, and another shape: it has to stay."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(8, 12, 3, 2, 1), nn.BatchNorm2d(12)
        self.short = nn.Conv2d(8, 12, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.na(self.a(x)) + self.short(x))


class Resnet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(Block(8, 6), Block(8, 10), Down(), Block(12, 9), Block(12, 7))
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # [B, 2, 8, 8]
        return self.head(self.blocks(F.relu(self.norm(self.stem(x)))).mean((2, 3)))


class Bottleneck(nn.Module):
    """Pre-activation, three widths, a gate; the stream is not positive, and gamma belongs to the block."""

    def __init__(self) -> None:
        super().__init__()
        self.n, self.a = nn.BatchNorm2d(8), nn.Conv2d(8, 5, 1)
        self.deep, self.b = nn.Conv2d(5, 5, 3, padding=1, groups=5), nn.Conv2d(5, 8, 1, bias=False)
        self.gamma = nn.Parameter(torch.rand(8, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(F.hardswish(self.deep(self.a(F.relu(self.n(x))))))
        return x + y * torch.sigmoid(y.mean((2, 3), keepdim=True)) * self.gamma


class Preactivated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(2, 8, 3, padding=1), nn.ModuleList(Bottleneck() for _ in range(3))
        self.last = nn.Conv2d(8, 6, 3, padding=1)
        self.wide = nn.Conv2d(6, 8, 1)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # [B, 2, 8, 8]
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = x + self.wide(F.gelu(self.last(x)))  # in no block of its own
        return self.head(x.mean((2, 3)))


class Looking(nn.Module):
    """Attention that returns a tuple and takes its mask by name."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(12, 36), nn.Linear(12, 12), 3

    def forward(self, x: Tensor, *, mask: Tensor) -> tuple[Tensor, None]:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)), None


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n1, self.look, self.n2 = nn.LayerNorm(12), Looking(), nn.LayerNorm(12)
        self.up, self.down, self.drop = nn.Linear(12, 20), nn.Linear(20, 12), nn.Dropout(0.1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.drop(self.look(self.n1(x), mask=mask)[0])
        return x + self.drop(self.down(F.gelu(self.up(self.n2(x)))))


class Former(nn.Module):
    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layers = nn.Linear(5, 12), nn.ModuleList(Layer() for _ in range(2))
        self.register_buffer(
            "mask", torch.zeros(6, 6).masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
        )
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # [B, 6, 5]
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x, self.mask)
        return self.head(x.mean(1))


class Torch(nn.Module):
    """PyTorch's own encoder layers, one with its norms before and one after the branches."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 12)
        self.one = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True, norm_first=True)
        self.two = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # [B, 6, 5]
        return self.head(self.two(self.one(self.stem(x))).mean(1))


# model, shape of an input, and for each branch the layers whose outputs are zero without it
NETS: dict[str, tuple[type[nn.Module], tuple[int, ...], dict[str, str]]] = {
    "resnet": (Resnet, (2, 8, 8), {f"blocks.{k}/add:0": f"blocks.{k}.nb" for k in (0, 1, 3, 4)}),
    "preactivated": (
        Preactivated, (2, 8, 8),
        {**{f"blocks.{k}/add:0": f"blocks.{k}.b" for k in range(3)}, "/add:0": "wide"},
    ),
    "former": (
        Former, (6, 5),
        {f"layers.{k}/add:{j}": f"layers.{k}.{end}"
         for k in (0, 1) for j, end in enumerate(("look.out", "down"))},
    ),
    "torch": (
        Torch, (6, 5),
        {f"{one}/add:{j}": f"{one}.{end}" for one in ("one", "two")
         for j, end in enumerate(("self_attn.out_proj", "linear2"))},
    ),
}  # fmt: skip


def given(name: str) -> tuple[nn.Module, Task]:
    kind, shape, _ = NETS[name]
    return solved(name, kind, shape, 16, scales=True)


def without(name: str, branches: Any, model: nn.Module | None = None) -> nn.Module:
    """The model with zeros in the last layers of branches, by hand. In PyTorch's attention, which calls its
    out_proj's weight, and elsewhere: weight and bias are zero, and so is what a norm adds."""
    model = copy.deepcopy(given(name)[0] if model is None else model)
    for branch in branches:
        layer: Any = model.get_submodule(NETS[name][2][branch])
        for tensor in (layer.weight, layer.bias):
            if tensor is not None:
                tensor.data.zero_()
    return model


def answers(model: nn.Module, task: Task) -> Tensor:
    model = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        return torch.cat([model(x.double()) for x, _ in task.batches("evaluate")])


def data(result: State, kind: str) -> list[Any]:
    return [entry.data for entry in result.ledger.entries if entry.kind == kind]


def gone(result: State) -> list[str]:
    return [item["branch"] for item in data(result, "removed")]


def macs(model: nn.Module, task: Task) -> float:
    """Multiply-accumulates of one sample, by PyTorch's counter."""
    x = next(iter(task.batches("evaluate")))[0]
    with (
        FlopCounterMode(display=False) as counter,
        torch.no_grad(),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        model.eval()(x)
    return counter.get_total_flops() / 2 / len(x)


def shorten(name: str, **settings: Any) -> tuple[nn.Module, Task, State]:
    return once(name, Shorten(**{"correct": False, "of": "branches", "keep": 0.5} | settings))


@cache
def once(name: str, step: Shorten) -> tuple[nn.Module, Task, State]:
    model, task = given(name)
    return model, task, run(model, step, task)


@pytest.mark.sampled
@pytest.mark.parametrize("keep", [0.8, 0.5, 0.01])
@pytest.mark.parametrize("name", NETS)
def test_it_computes_what_the_model_computes_with_zeros_written_by_hand(name: str, keep: float) -> None:
    model, task, result = shorten(name, keep=keep)
    count = {0.8: 1, 0.5: 2, 0.01: len(NETS[name][2])}[keep]
    assert len(gone(result)) == count
    want = answers(without(name, gone(result)), task)
    torch.testing.assert_close(answers(result.model(), task), want, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(want, answers(model, task), rtol=1e-3)
    assert torch.equal(answers(model, task), answers(given(name)[0], task)), "the given model changed"


@pytest.mark.parametrize("name", NETS)
def test_its_parameters_and_operations_are_gone(name: str, tmp_path: Path) -> None:
    model, task, result = shorten(name, keep=0.01)
    small = result.model()
    own = dict(model.named_parameters())
    # In the layers of a branch; gamma is a vector of the block, and goes with it.
    inside = {"resnet": ("blocks.0", "blocks.1", "blocks.3", "blocks.4"), "former": ("layers",),
              "preactivated": ("blocks", "last", "wide"),
              "torch": ("one.self", "one.li", "two.self", "two.li", "one.norm")}  # fmt: skip
    rest = {n for n in own if not n.startswith(inside[name])}
    assert {n for n, _ in small.named_parameters()} == rest
    assert set(result.forms) & set(own) == rest
    lost = sum(own[n].numel() for n in own.keys() - rest)
    nbytes = save(result, tmp_path / "small.tersor")
    assert nbytes < save(run(model, Entropy(), task), tmp_path / "whole.tersor") - 3 * lost
    layers = [
        m for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and f"{n}.weight" in rest
    ]
    x = next(iter(task.batches("evaluate")))[0]
    counted, hooks = [0.0], []
    for layer in layers:
        hooks.append(
            layer.register_forward_hook(
                lambda m, _, out: counted.__setitem__(
                    0, counted[0] + out.numel() * m.weight[0].numel() / len(x)
                )
            )
        )
    model(x)
    assert macs(small, task) == counted[0]


@pytest.mark.sampled(name="former")
@pytest.mark.parametrize("name", NETS)
def test_the_budget_is_that_of_pytorchs_counter(name: str) -> None:
    model, task, result = shorten(name, of="macs", keep=0.7)
    (note,) = data(result, "budget")
    assert note["before"] == macs(model, task)
    assert note["after"] == macs(result.model(), task) <= 0.7 * note["before"]
    model, task, result = shorten(name, of="parameters", keep=0.7)
    (note,) = data(result, "budget")
    assert note["before"] == sum(p.numel() for p in model.parameters())
    assert note["after"] == sum(p.numel() for p in result.model().parameters()) <= 0.7 * note["before"]


def test_bytes_are_those_that_are_stored_now() -> None:
    model, task = given("resnet")
    small = run(model, [Cluster(entries=4, where="blocks.*.a.*"), Entropy()], task)
    result = run(small, Shorten(of="bytes", keep=0.6, correct=False), task)
    (note,) = data(result, "budget")
    assert note["before"] == small.nbytes
    assert note["after"] == result.nbytes <= 0.6 * small.nbytes


@pytest.mark.parametrize("name", NETS)
def test_the_branch_that_moves_the_outputs_least_goes_first(name: str) -> None:
    """By trying all, then all that are left: greedily, with a slow loop."""
    model, task, result = shorten(name)
    want, first = answers(model, task), list[str]()
    for _ in range(2):
        damage = {}
        for branch in NETS[name][2].keys() - set(first):
            apart = answers(without(name, [*first, branch]), task) - want
            damage[branch] = float(apart.square().sum() / want.square().sum())
        first.append(min(damage, key=lambda key: damage[key]))
        assert data(result, "removed")[len(first) - 1]["damage"] == pytest.approx(damage[first[-1]], rel=1e-4)
    assert gone(result) == first


def test_damage_counts_for_what_it_saves() -> None:
    """Each choice has the least damage a multiply-accumulate, of what is still to be saved."""
    model, task, result = shorten("resnet", of="macs", keep=0.75)
    want, whole = answers(model, task), macs(model, task)
    first, cost, saves = list[str](), whole, dict[str, float]()
    while cost > 0.75 * whole:
        price = {}
        for branch in NETS["resnet"][2].keys() - set(first):
            apart = float((answers(without("resnet", [*first, branch]), task) - want).square().sum())
            block = model.get_submodule(branch.partition("/")[0])
            size = 64 if branch < "blocks.2" else 16  # positions
            saved = sum(size * m.weight.numel() for m in block.modules() if isinstance(m, nn.Conv2d))
            price[branch] = (apart / min(saved, cost - 0.75 * whole), saved)
        first.append(min(price, key=lambda key: price[key]))
        saves[first[-1]] = price[first[-1]][1]
        cost -= saves[first[-1]]
    for branch in sorted(first[:-1], key=lambda key: -saves[key]):  # what is needless comes back
        if cost + saves[branch] <= 0.75 * whole:
            cost += saves[branch]
            first.remove(branch)
    assert gone(result) == first


@pytest.mark.wide
def test_branches_that_a_larger_one_makes_needless_come_back() -> None:
    """The three blocks do less damage, and do not suffice; with the large branch none of them has to go."""
    model, task, result = shorten("preactivated", of="macs", keep=0.6)
    assert gone(result) == ["/add:0"]
    block = macs(shorten("preactivated", keep=0.8)[2].model(), task)
    assert macs(model, task) - 3 * (macs(model, task) - block) > 0.6 * macs(model, task)


def test_a_block_that_is_left_without_a_branch_is_an_identity() -> None:
    """Not only its layers: neither its addition nor its relu runs."""
    _, _, result = shorten("resnet", keep=0.01)
    small: Any = result.model()
    assert [type(block).__name__ for block in small.blocks] == [
        "Identity",
        "Identity",
        "Down",
        "Identity",
        "Identity",
    ]
    _, _, result = shorten("preactivated", keep=0.01)
    small = result.model()
    assert [type(block).__name__ for block in small.blocks] == ["Identity"] * 3
    assert [type(small.last).__name__, type(small.wide).__name__] == ["Identity", "Zeros"]


class Signed(nn.Module):
    """relu(x + f(x)) of an x that may be negative: without f it is relu(x), and no identity."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(2, 8, 3), Block(8, 5), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x)).mean((2, 3)))


def test_a_relu_after_a_stream_that_may_be_negative_stays() -> None:
    x = torch.randn(12, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    model = Signed().eval()
    task = Task("signed", evaluate=[(x, torch.zeros(12, dtype=torch.int64))])
    small: Any = run(model, Shorten(correct=False, of="branches", keep=0.5, unmet="nearest"), task).model()
    with torch.no_grad():
        stream = model.stem(x)
        assert (stream < 0).any()
        torch.testing.assert_close(small(x), model.head(F.relu(stream).mean((2, 3))))


@pytest.mark.sampled(name="former")
@pytest.mark.parametrize("name", NETS)
def test_files_load_into_the_users_class_and_undo_restores(name: str, tmp_path: Path) -> None:
    model, task = given(name)
    steps = [Shorten(keep=0.5, of="branches"), Finetune(epochs=1, lr=1e-3), Entropy()]
    result = run(model, steps, task, journal=tmp_path / "journal")
    nbytes = save(result, tmp_path / "m.tersor")
    assert nbytes == (tmp_path / "m.tersor").stat().st_size
    fresh = NETS[name][0]()
    loaded = load(tmp_path / "m.tersor")
    assert loaded.digest == result.digest
    assert torch.equal(answers(loaded.model(fresh), task), answers(result.model(), task))
    assert type(loaded.model(fresh)) is NETS[name][0]
    back = undo(result)
    for key, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[key], value)
    assert undo(result, 2, journal=tmp_path / "journal").digest == run(model, steps[:1], task).digest
    assert replay(model, result.ledger, tmp_path / "journal").digest == result.digest


@pytest.mark.sampled(name="former")
@pytest.mark.parametrize("name", NETS)
def test_it_trains_between_rounds(name: str) -> None:
    model, task = given(name)
    step = Shorten(keep=0.4, of="branches", rounds=2, epochs=1, lr=1e-3)
    result = run(model, step, task)
    assert len(data(result, "trained")) == 2
    assert 2 <= len(gone(result)) <= 3
    assert not torch.allclose(
        answers(result.model(), task), answers(without(name, gone(result)), task), rtol=1e-3
    )
    assert run(model, step, task).digest == result.digest


@pytest.mark.sampled(name="former")
@pytest.mark.parametrize("name", NETS)
def test_refitting_brings_the_outputs_nearer(name: str) -> None:
    model, task, cut = shorten(name, keep=0.7)
    _, _, fixed = shorten(name, keep=0.7, correct=True)
    assert gone(cut) == gone(fixed)
    want = answers(model, task)
    errors = [float((answers(r.model(), task) - want).square().sum()) for r in (cut, fixed)]
    assert errors[1] < 0.7 * errors[0], errors


def test_only_layers_after_the_branch_are_refitted() -> None:
    model, _, result = shorten("resnet", keep=0.8, correct=True)
    (branch,) = gone(result)
    block = int(branch.split(".")[1].split("/")[0])
    state, own = result.state_dict(), model.state_dict()
    changed = {key for key in own if key in state and not torch.equal(state[key], own[key])}
    norms = {key for key in changed if "running" in key or "batches" in key}  # settled anew, all of them
    before = ("stem", *(f"blocks.{k}." for k in range(block)))
    assert changed - norms
    assert not [key for key in changed - norms if key.startswith(before)]


@pytest.mark.wide
def test_it_resumes_after_a_kill_at_any_group(tmp_path: Path) -> None:
    model, task = given("preactivated")
    step = Shorten(keep=0.4, of="branches", rounds=2, epochs=1, lr=1e-3)
    whole = run(model, step, task, journal=tmp_path / "whole")
    files = sorted((tmp_path / "whole").glob("[0-9]*.group"))
    assert len(files) >= 7, "two cuts, corrections, trainings, and the notes"
    for count in (1, 2, 4, 6):
        folder = tmp_path / str(count)
        folder.mkdir()
        for path in [tmp_path / "whole" / "head.json", *files[:count]]:
            shutil.copy(path, folder)
        again = run(model, step, task, journal=folder, resume=True)
        assert again.digest == whole.digest
        assert again.ledger.digest == whole.ledger.digest


def onnx_operators(model: nn.Module, task: Task, path: Path) -> Counter[str]:
    from tersor.runtimes import onnxruntime as ort

    x = next(iter(task.batches("evaluate")))[0]
    ort.write(model, (x,), path)
    ort.compare(model, path, [(x,), (x[:3],)])  # also another batch size
    return Counter(item.op for item in ort.operators(path, (x,)))


@pytest.mark.sampled(name="preactivated")
@pytest.mark.parametrize("name", NETS)
def test_onnx_runtime_does_not_run_it(name: str, tmp_path: Path) -> None:
    """Neither its layers, nor additions of zeros, nor operators that make zeros."""
    pytest.importorskip("onnxruntime")
    ir = pytest.importorskip("onnx_ir")
    model, task, result = shorten(name, keep=0.01)
    before = onnx_operators(model, task, tmp_path / "before.onnx")
    after = onnx_operators(result.model(), task, tmp_path / "after.onnx")
    assert not set(after) & {"Expand", "ConstantOfShape", "Shape"}
    left = {"resnet": 3, "preactivated": 1, "former": 0, "torch": 0}[name]  # the stem, two of Down
    assert sum(n for kind, n in after.items() if "Conv" in kind) == left
    assert sum(after.values()) < 0.6 * sum(before.values())
    graph = ir.load(tmp_path / "after.onnx").graph
    sums = [node for node in graph if node.op_type == "Add" and not any(x.const_value for x in node.inputs)]
    assert len(sums) == (name == "resnet")  # that of Down


@pytest.mark.parametrize("first", [True, False], ids=["shorten first", "shorten last"])
@pytest.mark.parametrize(
    "other",
    [Slim(keep=0.7, unmet="nearest"), Prune(keep=0.5), Quantize(bits=4), Fold(), Quantize(activations=8)],
    ids=lambda step: step.name + str(getattr(step, "activations", "")),
)
@pytest.mark.long
@pytest.mark.parametrize("name", NETS)
def test_it_combines_with(name: str, other: Any, first: bool, tmp_path: Path) -> None:
    if getattr(other, "activations", 0) and not first:
        pytest.skip("ranges of activations have to be measured last")
    model, task = given(name)
    short = Shorten(keep=0.5, of="branches")
    result = run(model, [short, other] if first else [other, short], task)
    save(result, tmp_path / "m.tersor")
    again = load(tmp_path / "m.tersor").model(NETS[name][0]())
    batch = next(iter(task.batches("evaluate")))[0]
    with torch.no_grad():
        got = again.eval()(batch)
        assert torch.equal(got, result.model().eval()(batch))
        small = float((got - run(model, short, task).model().eval()(batch)).square().mean())
        power = float(model(batch).square().mean())
    assert len(gone(result)) == 2
    assert small < power, "the other step broke it"


def test_slim_after_it_cuts_the_width_of_its_zeros() -> None:
    """The stream that the zeros belong to can still get narrower: in Preactivated they stand for `wide`."""
    model, task, result = shorten("preactivated", keep=0.01)
    slim = run(result, Slim(keep=0.5, unmet="nearest", correct=False, exact=False), task)
    assert slim.shape("stem.weight")[0] < 8
    assert slim.shape("head.weight")[1] == slim.shape("stem.weight")[0]
    x = next(iter(task.batches("evaluate")))[0]
    assert slim.model().eval()(x).isfinite().all()


# What cannot be done


class Shared(nn.Module):
    """One layer in two branches, a weight that is read elsewhere too, and a branch of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice, self.tied = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.own, self.head = nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).tanh()
        x = x + self.twice(x).relu()
        x = x + self.twice(x).tanh()
        x = x + self.tied(x).relu()
        x = x + self.own(x).relu()
        return self.head(x) + (self.tied.weight * 0.01).sum()


def shared() -> tuple[nn.Module, Task]:
    x = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    return Shared().eval(), Task("shared", evaluate=[(x, torch.zeros(12, dtype=torch.int64))])


def test_weights_that_others_read_stay_and_are_named() -> None:
    model, task = shared()
    result = run(model, Shorten(keep=0.1, unmet="nearest"), task)
    assert gone(result) == ["/add:3"]
    (text,) = [entry.text for entry in result.ledger.entries if entry.kind == "budget"]
    assert "twice.weight is used elsewhere too" in text
    assert "tied.weight is used elsewhere too" in text
    with pytest.raises(RefusedError, match=r"Give keep=0\.\d+, or unmet=nearest.*twice\.weight is used"):
        run(model, Shorten(keep=0.1), task)
    with pytest.raises(
        RefusedError, match=r"no residual branch to remove: .*twice\.weight is used elsewhere"
    ):
        run(model, Shorten(where="twice.*"), task)


def test_shortcuts_with_layers_of_their_own_are_named() -> None:
    model, task = given("resnet")
    with pytest.raises(RefusedError, match=r"blocks\.2/add:0: the shortcut has layers of its own"):
        run(model, Shorten(where="blocks.2.*"), task)
    with pytest.raises(RefusedError, match="no residual branch"):
        run(tiny("mlp").model, Shorten(), tiny("mlp").task)


def test_where_chooses_branches_by_all_of_their_weights() -> None:
    model, task = given("resnet")
    step = Shorten(
        keep=0.3, of="branches", unmet="nearest", correct=False, where=("blocks.3.*", "blocks.4.a.*")
    )
    result = run(model, step, task)
    assert gone(result) == ["blocks.3/add:0"]
    told = {entry.site: entry.text for entry in result.ledger.entries if entry.site}
    assert "removed" in told["blocks.3.a.weight"]
    assert "blocks.4/add:0" in told["blocks.4.a.weight"]
    assert "stem.weight" not in told


class Reading(nn.Module):
    """Its code reads an attribute of the layer that it would lose, and another that fixes a shape."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = (
            nn.Linear(5, 8),
            nn.Linear(8, 6),
            nn.Linear(6, 8),
            nn.Linear(8, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.b(self.a(x).view(-1, self.a.weight.shape[0]).relu()))


def test_code_that_reads_a_lost_layer_keeps_it() -> None:
    x = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    task = Task("reading", evaluate=[(x, torch.zeros(12, dtype=torch.int64))])
    model = Reading().eval()
    with pytest.raises(RefusedError, match=r"/add:0: without its layers the model does not run: .*weight"):
        run(model, Shorten(), task)


class Moody(nn.Module):
    """In training mode it needs the layer that eval mode can do without."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.f, self.head = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = x + self.f(x)
        return self.head(y if not self.training else y * self.f.weight.mean())


def test_a_branch_whose_proof_fails_comes_back() -> None:
    x = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    task = Task("moody", evaluate=[(x, torch.zeros(12, dtype=torch.int64))])
    result = run(Moody().eval(), Shorten(unmet="nearest"), task)
    assert not gone(result)
    assert set(result.forms) == set(Moody().state_dict())
    (why,) = [entry.text for entry in result.ledger.entries if entry.kind == "budget"]
    assert "does not run" in why


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"keep": 0}, "the share kept"), ({"keep": 1}, "the share kept"), ({"of": "mac"}, "mean 'macs'"),
        ({"rounds": 0}, "1 or more"), ({"rounds": 2}, "epochs above 0"), ({"unmet": "near"}, "nearest"),
    ],
)  # fmt: skip
def test_settings_are_checked(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(SettingError, match=text):
        Shorten(**settings)


def test_a_dry_run_says_what_it_needs() -> None:
    (facts,) = check(Recipe((Shorten(),)), given("resnet")[0])
    assert facts["what"] == "Remove whole residual branches, so that the network has fewer layers."
    assert "task" in str(facts["needs"])
    for keep, of in itertools.product((0.5,), ("macs", "parameters", "bytes", "branches")):
        check(Recipe((Shorten(keep=keep, of=of),)))
