"""Frozen: what a user has set still in a model, and training leaves so.

requires_grad=False    of a tensor: it stays bit for bit, whatever form it has; weight decay leaves it too
eval()                 of some modules and not of others: modes that differ were set on purpose, so each
                       keeps its own, and with it dropout and running statistics. A model that is all in one
                       mode (after loading usually eval) says nothing: it trains in training mode
A parameter of a norm in eval mode still learns, as in plain PyTorch: eval() keeps statistics, not weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from tersor.errors import SettingError, few
from tersor.model.sites import Site

FROZEN = ("stay", "train")  # what a training does with what is frozen


@dataclass(frozen=True)
class Frozen:
    """What stays as it is while the rest trains."""

    tensors: tuple[str, ...] = ()  # sites
    modules: tuple[str, ...] = ()  # paths of modules that stay in eval mode, "" for the model itself
    outside: tuple[str, ...] = ()  # parameters of dtypes that nothing trains: complex, integers, 8-bit floats

    def learning(self, sites: Iterable[Site], who: str) -> list[str]:
        """Those of the sites that learn; SettingError where none does."""
        sites = [site for site in sites if site.is_parameter]
        left = [site.name for site in sites if site.name not in self.tensors]
        if sites and not left:
            raise SettingError(
                f"{who}: nothing is left to train: {few([site.name for site in sites])} stay as they are "
                f"(requires_grad=False). Unfreeze them, name others in where, or give frozen='train'"
            )
        if not left:
            raise SettingError(f"{who}: no parameter is left to train")
        return left

    def said(self) -> tuple[str, dict[str, Any]]:
        """A text and data for a note; "" where nothing stays."""
        tops = outermost(self.modules)
        count = len(self.modules)
        said = [
            (self.tensors, f"{of(self.tensors, 'frozen tensor')} not trained: {few(self.tensors)}"),
            (tops, f"{count} module{'s' * (count != 1)} kept in eval mode: {few(tops)}"),
            (self.outside, f"{of(self.outside, 'parameter')} left alone for the dtype: {few(self.outside)}"),
        ]
        text = "; ".join(text for names, text in said if names)
        return text, {"tensors": len(self.tensors), "modules": count, "dtypes": len(self.outside)}


def frozen_in(model: nn.Module, sites: Mapping[str, Site]) -> Frozen:
    """What is frozen in a model with these sites."""
    own = dict(model.named_parameters(remove_duplicate=False))
    outside = tuple(name for name, site in sites.items() if site.kind != "buffer" and not site.is_parameter)
    still = [name for name, site in sites.items() if site.is_parameter and name in own]
    modes = {path: module.training for path, module in model.named_modules()}
    mixed = len(set(modes.values())) > 1
    return Frozen(
        tuple(name for name in still if not own[name].requires_grad),
        tuple(path for path, training in modes.items() if mixed and not training),
        outside,
    )


def as_trained(model: nn.Module) -> nn.Module:
    """The model itself in the modes in which it trains."""
    return model if len({module.training for module in model.modules()}) > 1 else model.train()


def outermost(paths: Iterable[str]) -> list[str]:
    """The paths that lie in no other of them; the model itself is one among its modules."""
    known = set(paths) - {""}

    def above(path: str) -> Iterable[str]:
        words = path.split(".")
        return (".".join(words[:count]) for count in range(1, len(words)))

    return [path or "the model itself" for path in paths if not known & set(above(path))]


def of(names: Iterable[str], what: str) -> str:
    count = len(list(names))
    return f"{count} {what}{'s' * (count != 1)}"
