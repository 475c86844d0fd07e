"""Roles: small networks that each use a parameter in one way, and the sites that steps pick by role."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import MODELS, tiny
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.core.run import run
from tersor.core.state import start
from tersor.model.axis_origins import axes_of, of_shape, viewed
from tersor.model.graph import traced
from tersor.model.roles import roles
from tersor.model.sites import select
from tersor.model.task import Task
from tersor.steps import Prune, Quantize


class Of(nn.Module):
    """A network that is a function of parameters p, q and the input."""

    def __init__(self, func: Callable[..., Tensor], *shapes: tuple[int, ...]):
        super().__init__()
        self.func = func
        for name, shape in zip("pqr", shapes, strict=False):
            setattr(self, name, nn.Parameter(torch.rand(shape) + 0.1))
        self.register_buffer("places", torch.arange(12).reshape(3, 4) % 5)
        self.register_buffer("seen", torch.ones(4, 4).tril().bool())

    def forward(self, x: Tensor) -> Any:
        return self.func(self, x)


def standardized(m: Of, x: Tensor) -> Tensor:
    w = F.batch_norm(m.p.reshape(1, 6, -1), None, None, weight=m.q.view(-1), training=True, momentum=0.0)
    return F.conv2d(x, w.reshape_as(m.p))


def by_hand(m: Of, x: Tensor) -> Tensor:
    var, mean = torch.var_mean(m.p, dim=(1, 2, 3), keepdim=True)
    return F.conv2d(x, (m.p - mean) / (var + 1e-5).sqrt() * m.q)


def qkv(m: Of, x: Tensor) -> Tensor:
    q, k, v = m.p.view(3, 2, 2, 4).unbind(0)
    return x @ q.flatten(0, 1).T + F.linear(x, k.reshape(4, 4)) + F.linear(x, v.reshape(4, 4))


V, SEQ, IMAGE, IDS = (
    torch.randn(3, 4),
    torch.randn(2, 3, 4),
    torch.randn(2, 4, 5, 5),
    torch.randint(5, (2, 3)),
)
M, C = "matrix", "convolution"
# name -> function, shapes of p and q, input, (role, axis of outputs, contracted axis) of each
CASES: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]], Tensor, list[tuple[Any, ...]]]] = {
    "linear": (lambda m, x: F.linear(x, m.p, m.q), [(6, 4), (6,)], V, [(M, 0, 1), ("bias", 0, None)]),
    "x @ W": (lambda m, x: x @ m.p, [(4, 6)], V, [(M, 1, 0)]),
    "x @ W.T": (lambda m, x: x @ m.p.T, [(6, 4)], V, [(M, 0, 1)]),
    "W @ x": (lambda m, x: m.p @ x, [(6, 3)], V, [(M, 0, 1)]),
    "Conv1D": (lambda m, x: torch.addmm(m.q, x, m.p), [(4, 6), (6,)], V, [(M, 1, 0), ("bias", 0, None)]),
    "einsum": (lambda m, x: torch.einsum("bti,io->bto", x, m.p), [(4, 6)], SEQ, [(M, 1, 0)]),
    "einsum heads": (lambda m, x: torch.einsum("bti,hdi->bthd", x, m.p), [(2, 3, 4)], SEQ, [(M, 1, 2)]),
    "einsum heads first": (lambda m, x: torch.einsum("bti,ihd->bthd", x, m.p), [(4, 2, 3)], SEQ,
                           [("unknown", 0, None)]),
    "experts": (lambda m, x: torch.bmm(x, m.p), [(2, 4, 6)], SEQ, [(M, 2, 1)]),
    "moved axes": (lambda m, x: torch.bmm(x, m.p.movedim(2, 0)), [(4, 6, 2)], SEQ, [(M, 1, 0)]),
    "one by one kernel": (lambda m, x: F.linear(x, m.p.view(6, 4)), [(6, 4, 1, 1)], V, [(M, 0, 1)]),
    "parts of qkv": (qkv, [(12, 4)], V, [(M, 0, 1)]),
    "joined qkv": (lambda m, x: F.linear(x, torch.cat((m.p, m.q))), [(2, 4), (3, 4)], V, [(M, 0, 1)] * 2),
    "scaled weight": (lambda m, x: F.linear(x, m.p * 0.5 * m.q), [(6, 4), (6, 1)], V,
                      [(M, 0, 1), ("scale", 0, None)]),
    "conv": (lambda m, x: F.conv2d(x, m.p, m.q, groups=2), [(6, 2, 3, 3), (6,)], IMAGE,
             [(C, 0, 1), ("bias", 0, None)]),
    "transposed conv": (lambda m, x: F.conv_transpose2d(x, m.p), [(4, 2, 3, 3)], IMAGE, [(C, 1, 0)]),
    "standardized": (standardized, [(6, 4, 3, 3), (6, 1, 1, 1)], IMAGE, [(C, 0, 1), ("scale", 0, None)]),
    "standardized by hand": (by_hand, [(6, 4, 3, 3), (6, 1, 1, 1)], IMAGE, [(C, 0, 1), ("scale", 0, None)]),
    "table": (lambda m, x: F.embedding(x, m.p), [(5, 4)], IDS, [("table", 0, 1)]),
    "rows by index": (lambda m, x: m.p[x], [(5, 4)], IDS, [("table", 0, 1)]),
    "tied": (lambda m, x: F.linear(F.embedding(x, m.p), m.p), [(5, 4)], IDS, [("table", 0, 1)]),
    "tied the other way": (lambda m, x: m.p[x] @ m.p, [(5, 5)], IDS, [("unknown", 0, None)]),
    "layer scale": (lambda m, x: x * m.p, [(4, 1, 1)], IMAGE, [("scale", 0, None)]),
    "squeezed scale": (lambda m, x: x * m.p, [(1, 4, 1, 1)], IMAGE, [("scale", 0, None)]),
    "norm": (lambda m, x: F.layer_norm(x, (4,), m.p, m.q), [(4,), (4,)], V,
             [("scale", 0, None), ("bias", 0, None)]),
    "product by hand": (lambda m, x: (x.unsqueeze(1) * m.p).sum(-1), [(6, 4)], V, [("unknown", 0, None)]),
    "learned positions": (lambda m, x: x + m.p, [(1, 3, 4)], SEQ, [("position", 0, None)]),
    "sliced positions": (lambda m, x: x + m.p[:3], [(9, 4)], SEQ, [("position", 0, None)]),
    "positions by place": (lambda m, x: x + F.embedding(torch.arange(3), m.p), [(9, 4)], SEQ,
                           [("position", 0, None)]),
    "relative bias": (lambda m, x: (x @ x.mT) + m.p[m.places[:, :3]].permute(2, 0, 1), [(5, 2)], SEQ,
                      [("position", 0, None)]),
    "class token": (lambda m, x: torch.cat((m.p.expand(2, -1, -1), x), 1), [(1, 1, 4)], SEQ,
                    [("position", 0, None)]),
    "queries": (lambda m, x: F.scaled_dot_product_attention(F.linear(m.p, m.q).expand(2, -1, -1), x, x),
                [(1, 5, 4), (4, 4)], SEQ, [("position", 0, None), (M, 0, 1)]),
    "no rule": (lambda m, x: torch.cdist(x, m.p), [(5, 4)], V, [("unknown", 0, None)]),
    "unread": (lambda m, x: x * 2, [(5, 4)], V, [("unread", 0, None)]),
    "prelu": (lambda m, x: F.prelu(x, m.p), [(4,)], V, [("scale", 0, None)]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_roles(name: str) -> None:
    func, shapes, x, want = CASES[name]
    found = roles(traced(Of(func, *shapes), (x,)))
    assert [(found[p].word, found[p].axis, found[p].contracted) for p in "pqr"[: len(shapes)]] == want


@pytest.mark.parametrize("name", CASES)
def test_the_axis_of_outputs_moves_single_outputs(name: str) -> None:
    """Numerically: one index of the axis of outputs changes at most one index of the output's last axis."""
    func, shapes, x, want = CASES[name]
    if want[0][0] != M or name == "W @ x":
        return
    torch.manual_seed(0)
    model = Of(func, *shapes)
    with torch.no_grad():
        before = model(x)
        model.p.select(want[0][1], 1).add_(1.0)
        moved = (model(x) - before).abs().flatten(0, -2).amax(0) > 1e-6  # [O]
    assert 1 <= int(moved.sum()) <= (3 if "qkv" in name else 1)
    with torch.no_grad():
        before = model(x)
        model.p.select(want[0][2], 1).add_(1.0)
        assert ((model(x) - before).abs().flatten(0, -2).amax(0) > 1e-6).sum() > 1


def test_masks_and_running_statistics() -> None:
    model = Of(lambda m, x: (x @ x.mT).masked_fill(m.seen[:3, :3], 0.0) * m.p, (1,))
    assert roles(traced(model, (SEQ,)))["seen"].word == "mask"
    t = tiny("conv")
    found = roles(traced(t.model, (t.x,)))
    assert (found["norm0.running_mean"].word, found["norm0.running_var"].word) == ("bias", "scale")


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_unknown_in_the_tiny_models(name: str) -> None:
    t = tiny(name)
    assert [n for n, role in roles(traced(t.model, (t.x,))).items() if role.word == "unknown"] == []


def test_a_view_back_restores_the_labels() -> None:
    labels = of_shape((6, 4, 3, 3))
    assert viewed(viewed(labels, (1, 6, 36)), (6, 4, 3, 3)) == labels
    assert [axes_of(dim) for dim in viewed(labels, (2, 3, 4, 9))] == [{0}, {0}, {1}, {2, 3}]
    assert [axes_of(dim) for dim in viewed(of_shape((4, 6)), (3, 8))] == [{0, 1}, {0, 1}]


class Scaled(nn.Module):
    """A convolution, a channel scale of shape [1, C, 1, 1], positions, and a matrix [I, O]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.gain = nn.Parameter(torch.rand(1, 8, 1, 1) + 0.5)
        self.places = nn.Parameter(torch.randn(1, 8, 6, 6))
        self.head = nn.Parameter(torch.randn(8, 3))

    def forward(self, x: Tensor) -> Tensor:  # [B, 1, 6, 6]
        return (self.conv(x) * self.gain + self.places).relu().mean((2, 3)) @ self.head


def scaled() -> tuple[nn.Module, Task]:
    torch.manual_seed(0)
    x = torch.randn(8, 1, 6, 6)
    return Scaled(), Task("scaled", evaluate=[(x, torch.arange(8) % 3)])


def test_scales_and_positions_are_left_alone_and_named() -> None:
    model, task = scaled()
    result = run(model, Prune(keep=0.3), task)
    assert {edit.site for edit in result.ledger.edits()} == {"conv.weight", "head"}
    assert (result.sites["head"].kind, result.sites["head"].axis) == ("linear", 1)
    (note,) = result.ledger.notes("left")
    assert note.text == "left alone unless where names them: scale: gain; position: places"
    again = run(result, Quantize(), task)
    assert len(list(again.ledger.notes("left"))) == 1


def test_a_glob_that_names_them_picks_them() -> None:
    model, task = scaled()
    result = run(model, [Quantize(where="places"), Quantize(where="gain")], task)
    assert [edit.site for edit in result.ledger.edits()] == ["places", "gain"]
    assert [site.name for site in select(result.sites, "gain,conv*", "x")] == ["gain", "conv.weight"]


def test_without_a_task_kinds_are_from_classes_with_a_note() -> None:
    model, _ = scaled()
    state = start(model)
    assert (state.sites["head"].kind, state.sites["head"].axis) == ("other", 0)
    assert not state.sites["gain"].is_weight  # the shape shows it: only one axis is longer than 1
    (note,) = state.ledger.notes("classes")
    assert note.text == (
        "kinds are from the classes of layers, because there is no task with inputs for a trace; "
        "their layers' classes are unknown: places, head"
    )
    assert list(start(tiny("conv").model).ledger.notes()) == []


class Branching(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


def test_a_model_that_cannot_be_traced_has_kinds_from_classes_with_a_note() -> None:
    x = torch.randn(4, 5)
    task = Task("branching", evaluate=[(x, torch.arange(4) % 3)])
    result = run(Branching(5, 3), Prune(keep=0.5), task)
    (note,) = result.ledger.notes("classes")
    assert note.text.startswith(
        "kinds are from the classes of layers, because torch.export cannot trace the model: "
    )
    assert [edit.site for edit in result.ledger.edits()] == ["weight"]


def test_a_file_keeps_its_kinds(tmp_path: Any) -> None:
    from tersor.io.container import load
    from tersor.io.container_writer import save

    model, task = scaled()
    result = run(model, Prune(keep=0.3), task)
    save(result, tmp_path / "small.tersor")
    loaded = load(tmp_path / "small.tersor").on(model)
    assert dict(loaded.sites) == dict(result.sites)
    assert loaded.ledger.digest == result.ledger.digest


@pytest.mark.parametrize("turned", [False, True])
def test_the_role_of_a_kernel_has_its_groups(turned: bool) -> None:
    conv = F.conv_transpose2d if turned else F.conv2d
    m = Of(lambda m, x: conv(x, m.p, groups=2), (4, 2, 3, 3))
    assert roles(traced(m, (IMAGE,)))["p"].groups == 2
    task = Task(evaluate=[(IMAGE, torch.zeros(2, dtype=torch.long))])
    site = start(m, task).sites["p"]
    assert (site.kind, site.groups) == ("convtranspose" if turned else "conv", 2)
