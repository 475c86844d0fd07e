"""Sites: the names and kinds of what a model stores.

linear  conv  convtranspose  embedding  attention  recurrent     weights: of products, kernels, tables of rows
scale  bias  position  mask                                      left alone by steps unless named
other  buffer                                                    nobody knows; not trained
The class of its layer says a tensor's kind, until the graph of the model's forward says it better (roles.py).
A site is one entry of the state dict: a weight, another parameter, or a buffer. A tensor under several names
is one site under the first; the other names are aliases. Two tensors on one memory are two, for a copy of the
model parts them. Names come from the model as it was given and never change.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from tersor.dtypes import FLOATS, as_numbers, left_as
from tersor.errors import RefusedError, SettingError, SiteError, near_few
from tersor.forms.form import SLICE
from tersor.model.attention import Attention
from tersor.model.kinds import repeats
from tersor.model.state_dicts import handed, registered

LAYERS: tuple[tuple[type[nn.Module] | tuple[type[nn.Module], ...], str], ...] = (
    ((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), "convtranspose"),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), "conv"),
    (nn.Linear, "linear"),
    ((nn.Embedding, nn.EmbeddingBag), "embedding"),
    ((nn.MultiheadAttention, Attention), "attention"),
    (nn.RNNBase, "recurrent"),
    (nn.RNNCellBase, "recurrent"),
)
LEFT = ("scale", "bias", "position", "mask")  # kinds of parameters that steps leave alone


@dataclass(frozen=True)
class Site:
    """One stored tensor of a model."""

    name: str  # its first name in the state dict, such as "blocks.3.fc1.weight"
    shape: tuple[int, ...]
    dtype: str  # "float32", without "torch."
    kind: str  # what it is for: see above
    axis: int = 0  # the axis of outputs: 1 for transposed convolutions and for a matrix [I, O]
    groups: int = 1  # of a convolution
    layer: str = ""  # name of the module that owns it
    origin: str = ""  # where a site came from that the given model did not have: "fc1.weight left"

    @property
    def floating(self) -> bool:
        """Of a dtype that steps work on: others are stored as they are."""
        return self.torch_dtype in FLOATS

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def is_weight(self) -> bool:
        """A matrix or more of floats that is trained: what steps compress unless told otherwise. Where nobody
        knows what it is for, two of its axes must be longer than 1, or it may well be a scale."""
        if self.kind in LEFT or (self.kind == "other" and sum(size > 1 for size in self.shape) < 2):
            return False
        return self.is_parameter and len(self.shape) >= 2 and 0 not in self.shape

    @property
    def is_parameter(self) -> bool:
        return self.kind != "buffer" and self.floating

    @property
    def contracted(self) -> int | None:
        """The axis over which a product or a convolution sums; None where none is known. Of weights with more
        axes, such as those of experts [E, I, O], the last one that is not of outputs."""
        if len(self.shape) < 2 or self.kind in (*LEFT, "other", "buffer"):
            return None
        if self.kind.startswith("conv"):
            return 1 - self.axis
        return next(axis for axis in reversed(range(len(self.shape))) if axis != self.axis)


def sites_of(
    model: nn.Module, *, meta: bool = False
) -> tuple[dict[str, Site], dict[str, Tensor], dict[str, str]]:
    """(sites, their tensors, aliases: other name -> site name) of everything in the model's state dict.
    `meta`: tensors without values will do. RefusedError where it gives others than the module's own."""
    if not isinstance(model, nn.Module):
        raise SettingError(f"the model is a {type(model).__name__}, but it must be a torch.nn.Module")
    owners = {name: module for name, module, _, _ in registered(model)}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    sites, tensors, aliases = {}, {}, {}
    first: dict[int, str] = {}
    for name, value in handed(model, meta=meta).items():
        if repeats(value):
            raise RefusedError(
                f"{name}: it shows the same memory more than once, so no element can be written by itself. "
                f"Give the model a copy: x.contiguous()"
            )
        if id(value) in first:
            aliases[name] = first[id(value)]
            continue
        first[id(value)] = name
        layer = name.rpartition(".")[0] if name in owners else ""
        sites[name] = describe(name, value, owners[name] if name in parameters else None, layer)
        tensors[name] = value.detach()
    return sites, tensors, aliases


def describe(name: str, value: Tensor, owner: nn.Module | None, layer: str = "") -> Site:
    """The site of one tensor; an owner of None makes it a buffer."""
    kind = (
        "buffer" if owner is None else next((word for cls, word in LAYERS if isinstance(owner, cls)), "other")
    )
    return Site(
        name, tuple(value.shape), str(value.dtype).removeprefix("torch."), kind,
        axis=1 if kind == "convtranspose" and value.ndim > 1 else 0,
        groups=getattr(owner, "groups", 1) if kind.startswith("conv") else 1, layer=layer,
    )  # fmt: skip


def finite(tensors: Mapping[str, Tensor], sites: Mapping[str, Site]) -> None:
    """Refuse weights that hold NaN or infinity, by name and count. A buffer may hold infinities: attention
    masks do."""
    for name, value in tensors.items():
        if value.is_floating_point() or value.is_complex():
            wide = as_numbers(value)
            buffer = sites[name].kind == "buffer"
            parts = wide.reshape(-1).split(SLICE) if value.numel() else ()  # a mask of all would be large
            if bad := sum(int((part.isnan() if buffer else ~part.isfinite()).sum()) for part in parts):
                raise RefusedError(
                    f"{name}: {bad} of {value.numel()} values are NaN or infinite. "
                    f"Compressing a broken model hides the fault: load a sound checkpoint, or replace the "
                    f"values first."
                )


def select(sites: Mapping[str, Site], where: str | Iterable[str], who: str) -> list[Site]:
    """The sites that `where` means, in the model's order. `where` is a glob or several (a list, or one text
    with commas); "!" excludes. Globs pick weights; one that matches none picks from the other parameters
    (biases, norms).
    """
    wanted, unwanted = globs_of(where)
    weights = [site for site in sites.values() if site.is_weight]
    others = [site for site in sites.values() if site.is_parameter and not site.is_weight]
    chosen: dict[str, Site] = {}
    for pattern in wanted:
        found = matching(weights, pattern) or matching(others, pattern)
        if not found:
            raise SiteError(
                f"{who}: where={pattern!r} matches no weight; {missed(pattern, sites, [*weights, *others])}"
            )
        chosen |= {site.name: site for site in found}
    for pattern in unwanted:
        found = matching([*weights, *others], pattern)
        if not found:
            raise SiteError(
                f"{who}: where='!{pattern}' excludes nothing; {missed(pattern, sites, [*weights, *others])}"
            )
        for site in found:
            chosen.pop(site.name, None)
    if not chosen:
        raise SiteError(f"{who}: where={where!r} leaves no weight: everything it matches is excluded")
    return [site for name, site in sites.items() if name in chosen]


def globs_of(where: str | Iterable[str]) -> tuple[list[str], list[str]]:
    """(globs that mean sites, globs that exclude them)."""
    globs = [word.strip() for word in where.split(",")] if isinstance(where, str) else list(where)
    wanted = [glob for glob in globs if not glob.startswith("!")]
    return wanted or ["*"], [glob[1:] for glob in globs if glob.startswith("!")]


def matching(sites: Iterable[Site], pattern: str) -> list[Site]:
    return [site for site in sites if fnmatchcase(site.name, pattern)]


def missed(pattern: str, sites: Mapping[str, Site], others: list[Site]) -> str:
    """What to say of a glob that means none of the others: the dtype that it names, or near misses."""
    alone = [
        site for site in matching(sites.values(), pattern) if site.kind != "buffer" and not site.floating
    ]
    return f"{alone[0].name}: {left_as(alone[0].dtype)}" if alone else near(pattern, others)


def near(pattern: str, sites: list[Site]) -> str:
    """Near misses for a glob, with a list that stays short on large models."""
    names = [site.name for site in sites]
    if not names:
        return "the model has no parameter of floats"
    return near_few(pattern, names, "the model has")
