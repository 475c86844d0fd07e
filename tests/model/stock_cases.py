"""Stock cases: a small State for tests of changes, without an executor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tersor.forms import Dense, Form
from tersor.model.changed_copy import changed_structure
from tersor.model.changes import Change, Replace
from tersor.model.module_writer import write_module
from tersor.model.replaced_sites import site_changes
from tersor.model.sites import Site, sites_of


@dataclass
class State:
    """The given model, and its present sites and forms."""

    given: nn.Module
    sites: dict[str, Site] = field(default_factory=dict)
    forms: dict[str, Form] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sites, tensors, self.aliases = sites_of(self.given)
        self.forms = {name: Dense(value.cpu().clone()) for name, value in tensors.items()}

    def change(self, *changes: Change) -> State:
        for change in changes:
            if isinstance(change, Replace):
                new = site_changes(
                    change, self.sites, self.forms, self.aliases, changed_structure(self.given, self.changes)
                )
                for name in new.removed:
                    del self.sites[name], self.forms[name]
                for name, (site, form) in new.added.items():
                    self.sites[name], self.forms[name] = site, form
                self.aliases = new.aliases
            self.changes.append(change)
        return self

    def cut(self, name: str, axis: int, *kept: int) -> State:
        self.forms[name] = self.forms[name].take(axis, torch.tensor(kept))
        return self

    def edit(self, name: str, how: Callable[[torch.Tensor], Form]) -> State:
        self.forms[name] = how(self.forms[name].decode())
        return self

    def model(self, given: nn.Module | None = None) -> Any:
        return write_module(given or self.given, self.forms, self.sites, self.aliases, self.changes)
