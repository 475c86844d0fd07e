"""Replaced sites: the sites that a Replace removes and adds, and the forms of the new ones.

New sites take the old sites' forms, whole or split: a form is decoded only if that is unavoidable.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tersor.errors import RefusedError, SiteError, did_you_mean
from tersor.forms import Form, Grid
from tersor.model.changes import Replace
from tersor.model.convolution_factors import FACTORS
from tersor.model.sites import Site, describe
from tersor.model.stock import Untie, module_at, names_of, stock_of


class SiteChanges(NamedTuple):
    """The effect of a Replace on the sites."""

    removed: tuple[str, ...]  # sites that are removed
    added: dict[str, tuple[Site, Form]]  # sites that are added
    aliases: dict[str, str]  # all aliases afterwards


def site_changes(
    change: Replace, sites: Mapping[str, Site], forms: Mapping[str, Form], aliases: Mapping[str, str],
    model: nn.Module,
) -> SiteChanges:  # fmt: skip
    """The sites that are removed and added by `change`, with the forms of the added ones.

    `model`: the model after all earlier changes, as `restructured.changed` returns it; its values are not
    read. RefusedError if a removed site is tied to one that stays.
    """
    layer, stock = module_at(model, change.module), stock_of(change)
    paths = names_of(model, layer)
    new = stock.build(layer, change)
    if isinstance(stock, Untie):
        return untied(change, sites, forms, aliases, paths=paths, layer=layer)
    own = {name: site_of(join(paths[0], name), sites, aliases) for name in layer.state_dict(keep_vars=True)}
    mine = {join(path, name) for path in paths for name in own}
    after = stock.forms(layer, change, {name: (sites[site], forms[site]) for name, site in own.items()})
    dead = tuple(dict.fromkeys(site for name, site in own.items() if name not in after))
    for name, site in own.items():
        others = {site, *(alias for alias, of in aliases.items() if of == site)} - mine
        if site in dead and others:
            alias = join(paths[0], name) if site in others else min(others)
            raise RefusedError(
                f"{join(paths[0], name)} is tied to {min(others)}, which stays. "
                f"Untie them first: {untie(alias)}"
            )
    added: dict[str, tuple[Site, Form]] = {}
    left = {alias: site for alias, site in aliases.items() if site not in dead}
    like = next((sites[site].torch_dtype for site in own.values() if sites[site].floating), torch.float32)
    for name, (form, origin) in after.items():
        if name in own:
            continue
        first, *more = (join(path, name) for path in paths)
        above = name.rpartition(".")[0]
        new_site = describe(first, meta(form, like), new.get_submodule(above), join(paths[0], above))
        added[first] = (replace(new_site, origin=join(change.module, origin)), form)
        left |= dict.fromkeys(more, first)
    return SiteChanges(dead, added, left)


def untied(
    change: Replace, sites: Mapping[str, Site], forms: Mapping[str, Form], aliases: Mapping[str, str],
    *, paths: list[str], layer: nn.Module,
) -> SiteChanges:  # fmt: skip
    """The effect of untying: an alias becomes a site. Other names of its module become aliases of it."""
    name = str(change.settings["tensor"])
    first, *more = (join(path, name) for path in paths)
    if first not in aliases:
        tied = sorted(alias for alias, site in aliases.items() if site == first)
        advice = f"untie {tied[0]} instead" if tied else "it is tied to nothing"
        raise RefusedError(f"{first} is a site, not an alias: {advice}")
    site = aliases[first]
    value = meta(forms[site], sites[site].torch_dtype)
    new = describe(first, value, layer if name in layer._parameters else None, paths[0])
    others = {alias: of for alias, of in aliases.items() if alias not in (first, *more)}
    return SiteChanges(
        (), {first: (replace(new, origin=f"{site} untied"), forms[site])}, others | dict.fromkeys(more, first)
    )


def untie(name: str) -> Replace:
    """The Replace that makes this alias a site."""
    module, _, tensor = name.rpartition(".")
    return Replace(module, "untie", {"tensor": tensor})


def site_of(name: str, sites: Mapping[str, Site], aliases: Mapping[str, str]) -> str:
    if (site := name if name in sites else aliases.get(name, "")) not in sites:
        raise SiteError(f"there is no site {name!r}; {did_you_mean(name, sites)}")
    return site


def join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


def meta(form: Form, dtype: torch.dtype) -> Tensor:
    """A tensor of a form's shape, without memory."""
    return torch.empty(form.shape, dtype=dtype, device="meta")


def edge_gone(change: Replace, edge: str, grid: Grid) -> bool:
    """Whether a replacement takes an edge away, so that its grid could never be calibrated again. Other grids
    become stale, except dynamic ones, which go where a layer computes differently."""
    path, gone = edge.partition("/")[0], change.stock in ("identity", "zeros")
    if path != change.module:
        return gone and path.startswith(f"{change.module}.")
    return gone or (grid.scale is None and change.stock in ("product", "attention", *FACTORS))
