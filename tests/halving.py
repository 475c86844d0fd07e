"""A toy step that cuts, and models that it knows by heart: what a graph would find is written down here.

conv       batch norm and a skip: one channel group through four layers, one site cut along both of its axes
mixed      depthwise, grouped and transposed convolutions: groups that are left, kernels shared by groups
tied       an embedding that is also the head: its width, through one tensor under two names
heads      attention of our own with num_heads; nn.MultiheadAttention refuses a plain cut: replaced first
lstm       hidden units, frozen with a note
mlp        plain rows and columns
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from tiny import CLASSES, MODELS, TOKENS, tokens, vectors
from torch import Tensor, nn

from tersor.core.step import Needs
from tersor.core.view import View
from tersor.model.changes import Replace, Set
from tersor.record.events import Cut, Event, Group, Note


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(TOKENS, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, TOKENS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:  # [B, T] -> [B, K]
        x = self.embed(tokens).mean(1)
        return self.head(x + self.mix(x).tanh())


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 3
        self.inner, self.qkv, self.out = nn.Linear(6, 8), nn.Linear(8, 36), nn.Linear(12, 8)
        self.multi = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, 6]
        x = self.inner(x)
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, 4)).permute(2, 0, 3, 1, 4)
        x = x + self.out((q @ k.transpose(2, 3) / 2).softmax(3).matmul(v).transpose(1, 2).flatten(2))
        x = x + self.multi(x, x, x, need_weights=False)[0]
        return self.head(x.mean(1))


CUTTABLE: dict[str, tuple[type[nn.Module], Callable[[int, torch.Generator], Tensor], int]] = {
    **{name: MODELS[name] for name in ("mlp", "conv", "mixed", "lstm")},
    "tied": (Tied, tokens, TOKENS),
    "heads": (Heads, vectors(5, 6), CLASSES),
}

Where = tuple[str, int, bool]  # site, axis, whether it reads units there
BATCH_NORM = ("weight", "bias", "running_mean", "running_var")


def makes(*names: str) -> list[Where]:
    return [(name, 0, False) for name in names]


GROUPS: dict[str, dict[str, list[Where]]] = {
    "mlp": {
        "first": [*makes("layers.0.weight", "layers.0.bias"), ("layers.2.weight", 1, True)],
        "last": [*makes("layers.4.weight", "layers.4.bias"), ("layers.6.weight", 1, True)],
    },
    "conv": {
        "stream": [
            *makes("stem.weight", "block.weight", "block.bias"),
            *makes(*(f"{norm}.{key}" for norm in ("norm0", "norm1") for key in BATCH_NORM)),
            ("block.weight", 1, True), ("head.weight", 1, True),
        ],
    },
    "mixed": {
        "point": [*makes("point.weight", "point.bias"), ("line.weight", 1, True)],
        "line": [*makes("line.weight", "line.bias"), ("back.weight", 0, True)],
        "back": [("back.weight", 1, False), *makes("back.bias"), ("head.weight", 1, True)],
    },
    "tied": {
        "width": [
            ("embed.weight", 1, True), *makes("mix.weight", "mix.bias"), ("mix.weight", 1, True),
        ],
    },
    "heads": {},
    "lstm": {},
}  # fmt: skip


@dataclass(frozen=True)
class Halving:
    """Cut the last unit of every channel group."""

    name: ClassVar[str] = "halving"
    model: str = "conv"
    where: str = "*"

    @property
    def needs(self) -> Needs:
        return Needs.MODEL | Needs.TASK | Needs.WHOLE

    def run(self, view: View) -> Iterator[Group]:
        for key, places in GROUPS[self.model].items():
            yield Group(key, tuple(last(view, places)))
        if self.model == "mixed":
            yield from grouped(view)
        if self.model == "heads":
            yield from heads(view)
        if self.model == "lstm":
            yield Group(
                "frozen", [Note("cell.weight_hh_l0", "skipped", "hidden units of LSTMs stay as they are")]
            )
        known = {place[0] for places in GROUPS[self.model].values() for place in places}
        others = [site for site in view.sites.values() if site.is_weight and site.name not in known]
        yield Group(
            "rest", [Note(site.name, "skipped", "no group was written down for it") for site in others]
        )


def last(view: View, places: list[Where]) -> Iterator[Event]:
    """Cuts of all units but the last; none where two are left, for an axis of one means something else."""
    for site, axis, reads in places:
        present = view.present(site, axis)
        yield Cut(site, axis, present[:-1] if len(present) > 2 else present, reads)


def grouped(view: View) -> Iterator[Group]:
    """A channel of each group of a transposed convolution, which a grouped one reads; a channel of each group
    of the grouped one, which a depthwise one passes on: its groups are fewer then."""
    of_up = view.present("up.weight", 1)
    if len(of_up) == 2:
        yield Group("up", [
            Cut("up.weight", 1, of_up[:1]), Cut("up.bias", 0, (0, 2)),
            Cut("grouped.weight", 1, (0,), reads=True),
        ])  # fmt: skip
    kept = view.present("depthwise.weight", 0)
    if len(kept) == 6:
        kept = (0, 1, 3, 4)
        cuts = [
            Cut(f"{name}.{key}", 0, kept) for name in ("grouped", "depthwise") for key in ("weight", "bias")
        ]
        yield Group("depthwise", [*cuts, Cut("point.weight", 1, kept, True), Set("depthwise", "groups", 4)])


def heads(view: View) -> Iterator[Group]:
    """A head of our own attention; one of nn.MultiheadAttention, at first as it is, then in a stock one."""
    rows = view.present("qkv.weight", 0)
    left = sorted({row % 12 // 4 for row in rows})
    if len(left) > 2:
        yield Group("own", [*cuts_of(left[:-1], "qkv", "out", 3), Set("", "num_heads", len(left) - 1)])
    if "multi.in_proj_weight" in view.sites and len(view.present("multi.in_proj_weight", 0)) == 24:
        yield Group("plain", [*multi([0]), Set("multi", "num_heads", 1)])
        yield Group("stock", [Replace("multi", "attention")])
        yield Group("multi", [*multi([0]), Set("multi", "num_heads", 1)])


def cuts_of(left: list[int], qkv: str, out: str, count: int) -> list[Event]:
    columns = tuple(4 * head + k for head in left for k in range(4))
    rows = tuple(4 * count * part + column for part in range(3) for column in columns)
    return [
        Cut(f"{qkv}.weight", 0, rows),
        Cut(f"{qkv}.bias", 0, rows),
        Cut(f"{out}.weight", 1, columns, True),
    ]


def multi(left: list[int]) -> list[Event]:
    columns = tuple(4 * head + k for head in left for k in range(4))
    rows = tuple(8 * part + column for part in range(3) for column in columns)
    return [
        Cut("multi.in_proj_weight", 0, rows), Cut("multi.in_proj_bias", 0, rows),
        Cut("multi.out_proj.weight", 1, columns, True),
    ]  # fmt: skip
