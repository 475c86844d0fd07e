"""Sites: the names and kinds of the tensors that a model stores.

linear  conv  convtranspose  embedding  attention  recurrent     weights: of products, kernels, tables of rows
scale  bias  position  mask                                      left alone by steps unless named
other  buffer                                                    unknown; not trained
The class of its layer determines a tensor's kind, unless the graph of the model's forward does (roles.py).
A site is one entry of the state dict: a weight, another parameter, or a buffer. A tensor with several names
is one site under the first; the other names are aliases. Two tensors that share memory are two sites, because
a copy of the model separates them. Names come from the given model and never change.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from tersor.dtypes import FLOATS, as_numbers, skip_reason
from tersor.errors import RefusedError, SettingError, SiteError, did_you_mean, near_few
from tersor.forms.form import SLICE
from tersor.model.attention import Attention
from tersor.model.kinds import repeats
from tersor.model.state_dicts import own_tensors, registered

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


def known(name: str, among: Iterable[str]) -> str:
    """The name. SiteError if it is not among these."""
    if name not in among:
        raise SiteError(f"no weight {name!r}; {did_you_mean(name, among)}")
    return name


@dataclass(frozen=True)
class Site:
    """One stored tensor of a model."""

    name: str  # its first name in the state dict, such as "blocks.3.fc1.weight"
    shape: tuple[int, ...]
    dtype: str  # "float32", without "torch."
    kind: str  # see the list above
    axis: int = 0  # the axis of outputs: 1 for transposed convolutions and for a matrix [I, O]
    groups: int = 1  # of a convolution
    layer: str = ""  # name of the module that owns it
    origin: str = ""  # for a site that the given model did not have, its source: "fc1.weight left"

    @property
    def floating(self) -> bool:
        """Whether steps work on its dtype. Tensors of other dtypes are stored unchanged."""
        return self.torch_dtype in FLOATS

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def indices(self, axis: int) -> tuple[int, ...]:
        """The given indices of an axis. SettingError if the tensor has no such axis."""
        if not 0 <= axis < len(self.shape):
            last = len(self.shape) - 1
            raise SettingError(f"{self.name}: axis={axis}, but its axes are 0 to {last}: {list(self.shape)}")
        return tuple(range(self.shape[axis]))

    @property
    def is_weight(self) -> bool:
        """Whether steps compress it by default: a trained tensor of floats with two axes or more. If its kind
        is unknown, two of its axes must be longer than 1, otherwise it may be a scale."""
        if self.kind in LEFT or (self.kind == "other" and sum(size > 1 for size in self.shape) < 2):
            return False
        return self.is_parameter and len(self.shape) >= 2 and 0 not in self.shape

    @property
    def is_parameter(self) -> bool:
        return self.kind != "buffer" and self.floating

    @property
    def contracted(self) -> int | None:
        """The axis over which a product or a convolution sums; None if unknown. For weights with more axes,
        such as those of experts [E, I, O], the last axis that is not of outputs."""
        if len(self.shape) < 2 or self.kind in (*LEFT, "other", "buffer"):
            return None
        if self.kind.startswith("conv"):
            return 1 - self.axis
        return next(axis for axis in reversed(range(len(self.shape))) if axis != self.axis)


def sites_of(
    model: nn.Module, *, meta: bool = False
) -> tuple[dict[str, Site], dict[str, Tensor], dict[str, str]]:
    """(sites, their tensors, aliases: other name -> site name) of everything in the model's state dict.
    `meta`: allow meta tensors. RefusedError if the state dict holds tensors that are not the module's own."""
    if not isinstance(model, nn.Module):
        raise SettingError(f"the model is a {type(model).__name__}, but it must be a torch.nn.Module")
    owners = {name: module for name, module, _, _ in registered(model)}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    sites, tensors, aliases = {}, {}, {}
    first: dict[int, str] = {}
    for name, value in own_tensors(model, meta=meta).items():
        if repeats(value):
            raise RefusedError(
                f"{name}: some of its elements share memory, so they cannot be written separately. "
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
    """The site of one tensor; a buffer if `owner` is None."""
    kind = (
        "buffer" if owner is None else next((word for cls, word in LAYERS if isinstance(owner, cls)), "other")
    )
    return Site(
        name, tuple(value.shape), str(value.dtype).removeprefix("torch."), kind,
        axis=1 if kind == "convtranspose" and value.ndim > 1 else 0,
        groups=getattr(owner, "groups", 1) if kind.startswith("conv") else 1, layer=layer,
    )  # fmt: skip


def finite(tensors: Mapping[str, Tensor], sites: Mapping[str, Site]) -> None:
    """RefusedError for a parameter with NaN or infinity, or a buffer with NaN. A buffer may hold infinities:
    attention masks do."""
    for name, value in tensors.items():
        if value.is_floating_point() or value.is_complex():
            wide = as_numbers(value)
            buffer = sites[name].kind == "buffer"
            parts = wide.reshape(-1).split(SLICE) if value.numel() else ()  # bounds the size of the masks
            if bad := sum(int((part.isnan() if buffer else ~part.isfinite()).sum()) for part in parts):
                raise RefusedError(
                    f"{name}: {bad} of {value.numel()} values are NaN or infinite. "
                    f"Compressing a broken model hides the fault: load another checkpoint, or replace the "
                    f"values first."
                )


class Selections:
    """What globs pick from all sites of a model, found once for each `where`."""

    def __init__(self, sites: Mapping[str, Site]) -> None:
        self.sites = sites
        self.found: dict[tuple[str, ...], frozenset[str]] = {}

    def names(self, where: str | Iterable[str], who: str) -> frozenset[str]:
        key = (where,) if isinstance(where, str) else tuple(where)
        if key not in self.found:
            self.found[key] = frozenset(site.name for site in select(self.sites, where, who))
        return self.found[key]


class PartOf(dict[str, Site]):
    """Some sites of a model, from which `select` picks as if all were there: a file is packed tensor by
    tensor, and the time for one must not grow with their number."""

    def __init__(self, sites: Mapping[str, Site], model: Selections) -> None:
        super().__init__(sites)
        self.model = model


def select(sites: Mapping[str, Site], where: str | Iterable[str], who: str) -> list[Site]:
    """The sites that `where` picks, in the model's order. `where` is a glob or several (a list, or one string
    with commas); "!" excludes. Globs pick weights; a glob that matches no weight picks from the other
    parameters (biases, norms). SiteError for a glob that matches nothing.
    """
    if isinstance(sites, PartOf):
        names = sites.model.names(where, who)
        return [site for name, site in sites.items() if name in names]
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
    """(globs that pick sites, globs that exclude sites)."""
    globs = [word.strip() for word in where.split(",")] if isinstance(where, str) else list(where)
    wanted = [glob for glob in globs if not glob.startswith("!")]
    return wanted or ["*"], [glob[1:] for glob in globs if glob.startswith("!")]


def matching(sites: Iterable[Site], pattern: str) -> list[Site]:
    return [site for site in sites if fnmatchcase(site.name, pattern)]


def missed(pattern: str, sites: Mapping[str, Site], others: list[Site]) -> str:
    """Why a glob matches nothing: it matches only a parameter of a dtype that steps leave alone, or near
    misses."""
    other = [
        site for site in matching(sites.values(), pattern) if site.kind != "buffer" and not site.floating
    ]
    return f"{other[0].name}: {skip_reason(other[0].dtype)}" if other else near(pattern, others)


def near(pattern: str, sites: list[Site]) -> str:
    """Near misses for a glob, with a list that stays short on large models."""
    names = [site.name for site in sites]
    if not names:
        return "the model has no floating-point parameter"
    return near_few(pattern, names, "the model has")
