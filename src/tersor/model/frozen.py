"""Frozen: the tensors and modules that the user has frozen, which training does not change.

requires_grad=False    for a tensor: it stays equal bit for bit in any form, and has no weight decay
eval()                 for some modules but not all: different modes were set on purpose, so each module keeps
                       its mode, and with it dropout and running statistics. If all modules have one mode
                       (usually eval after loading), the model trains in training mode
A norm's parameters in eval mode still learn, as in plain PyTorch: eval() freezes statistics, not weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from tersor.errors import SettingError, few
from tersor.model.sites import Site

FROZEN = ("stay", "train")  # the setting frozen=: frozen tensors stay, or are trained too


@dataclass(frozen=True)
class Frozen:
    """The parts of a model that training does not change."""

    tensors: tuple[str, ...] = ()  # sites
    modules: tuple[str, ...] = ()  # paths of modules that stay in eval mode, "" for the model itself
    outside: tuple[str, ...] = ()  # parameters of untrainable dtypes: complex, integers, 8-bit floats

    def learning(self, sites: Iterable[Site], who: str) -> list[str]:
        """The names of the sites that learn; SettingError if none does."""
        sites = [site for site in sites if site.is_parameter]
        left = [site.name for site in sites if site.name not in self.tensors]
        if sites and not left:
            raise SettingError(
                f"{who}: nothing is left to train: requires_grad=False for "
                f"{few([site.name for site in sites])}. Unfreeze them, name others in where, or give "
                f"frozen='train'"
            )
        if not left:
            raise SettingError(f"{who}: no parameter is left to train")
        return left

    def summary(self) -> tuple[str, dict[str, Any]]:
        """(text, data) for a note; the text is "" if nothing is frozen."""
        tops = outermost(self.modules)
        count = len(self.modules)
        parts = [
            (self.tensors, f"{counted(self.tensors, 'frozen tensor')} not trained: {few(self.tensors)}"),
            (tops, f"{count} module{'s' * (count != 1)} kept in eval mode: {few(tops)}"),
            (
                self.outside,
                f"{counted(self.outside, 'parameter')} not trained because of the dtype: {few(self.outside)}",
            ),
        ]
        text = "; ".join(text for names, text in parts if names)
        return text, {"tensors": len(self.tensors), "modules": count, "dtypes": len(self.outside)}


def frozen_in(model: nn.Module, sites: Mapping[str, Site]) -> Frozen:
    """The frozen parts of a model with these sites."""
    own = dict(model.named_parameters(remove_duplicate=False))
    outside = tuple(name for name, site in sites.items() if site.kind != "buffer" and not site.is_parameter)
    parameters = [name for name, site in sites.items() if site.is_parameter and name in own]
    modes = {path: module.training for path, module in model.named_modules()}
    mixed = len(set(modes.values())) > 1
    return Frozen(
        tuple(name for name in parameters if not own[name].requires_grad),
        tuple(path for path, training in modes.items() if mixed and not training),
        outside,
    )


def as_trained(model: nn.Module) -> nn.Module:
    """The model itself, in the modes in which it trains."""
    return model if len({module.training for module in model.modules()}) > 1 else model.train()


def outermost(paths: Iterable[str]) -> list[str]:
    """The paths that are not inside another of the paths; "" does not count as containing the others."""
    known = set(paths) - {""}

    def above(path: str) -> Iterable[str]:
        words = path.split(".")
        return (".".join(words[:count]) for count in range(1, len(words)))

    return [path or "the model itself" for path in paths if not known & set(above(path))]


def counted(names: Iterable[str], what: str) -> str:
    count = len(list(names))
    return f"{count} {what}{'s' * (count != 1)}"
