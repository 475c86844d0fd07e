"""Given model: a private copy with plain weights, its sites with their roles, and notes for the ledger.

The model is copied, weights that its layers compute become plain (parametrizations.py), and the graph of its
forward on the task's inputs determines the role of each tensor (roles.py). Without a task, or if the model
cannot be traced, the classes of its layers determine the kinds, as far as they are known.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from tersor.errors import RefusedError, TaskError
from tersor.model.batches import device_of, move
from tersor.model.changed_copy import own_copy
from tersor.model.example import example_inputs
from tersor.model.graph import traced
from tersor.model.parametrizations import materialized
from tersor.model.part import check_parts, part_of
from tersor.model.program import Program
from tersor.model.roles import roles, with_role
from tersor.model.sites import LEFT, Site, finite, sites_of
from tersor.model.task import Task


class GivenModel(NamedTuple):
    """A model to start from."""

    module: nn.Module
    sites: dict[str, Site]
    tensors: dict[str, Tensor]
    aliases: dict[str, str]
    masks: dict[str, Tensor]  # of weights that torch.nn.utils.prune has pruned, by site
    notes: dict[str, str]  # notes for the ledger, by kind


def given_model(model: nn.Module, task: Task | None = None) -> GivenModel:
    """A copy of `model` to start from. RefusedError if its state dict cannot be stored, or holds NaN or
    infinity."""
    sites, tensors, _ = sites_of(model)
    finite(tensors, sites)
    module = own_copy(model)
    masks, by = materialized(module)
    sites, tensors, aliases = sites_of(module)
    finite(tensors, sites)
    notes = {}
    if by:
        listed = ", ".join(f"{name} ({what})" for name, what in by.items())
        notes["effective"] = f"stored as plain weights, with the values their layers compute: {listed}"
    if isinstance(module, Program):
        notes["program"] = (
            f"the model is an exported program, for {module.forward.sizes} (* may vary), without the user's "
            "code. In training its norms and dropout work as layers do; the rest is as in eval mode"
        )
        if asleep := module.forward.asleep:
            notes["program"] += f", with {', '.join(asleep)}, which may do more when the model trains"
    sites, why = with_roles(module, sites, aliases, task)
    guessed = [name for name, site in sites.items() if site.kind == "other" and site.is_weight]
    if why and (guessed or task is not None):
        rest = f"; their layers' classes are unknown: {', '.join(guessed)}" if guessed else ""
        notes["classes"] = f"kinds are from the classes of layers, because {why}{rest}"
    if left := left_alone(sites):
        listed = "; ".join(f"{word}: {', '.join(names)}" for word, names in left.items())
        notes["left"] = f"left alone unless where names them: {listed}"
    return GivenModel(module, sites, tensors, aliases, {n: masks[n] for n in masks if n in sites}, notes)


def with_roles(
    module: nn.Module, sites: dict[str, Site], aliases: Mapping[str, str], task: Task | None
) -> tuple[dict[str, Site], str]:
    """(the sites with their roles, the reason if the roles were not found)."""
    if task is None:
        return sites, "there is no task with inputs for a trace"
    check_parts(module, task)
    try:
        part, its = part_of(module, task, lambda: module)
        found = roles(traced(part, move(example_inputs(its, part), device_of(module))))
    except (RefusedError, TaskError) as error:
        return sites, str(error)
    found = {name: role for name, role in found.items() if task.in_part(name)}
    by_site = {aliases.get(name, name): role for name, role in found.items()}
    return {
        name: with_role(site, by_site[name]) if name in by_site else site for name, site in sites.items()
    }, ""


def left_alone(sites: Mapping[str, Site]) -> dict[str, list[str]]:
    """Parameters with two or more axes that are not weights, by kind."""
    found: dict[str, list[str]] = {}
    for name, site in sites.items():
        if site.is_parameter and len(site.shape) > 1 and not site.is_weight and 0 not in site.shape:
            found.setdefault(site.kind if site.kind in LEFT else "one long axis", []).append(name)
    return found
