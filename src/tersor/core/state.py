"""State: a model as forms. Runs start from a state and return one, and a file holds one.

A run that starts from a state continues its ledger. Measurements are compared with the model as it was first
given (`base`), never with the result of an earlier run.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from torch import Tensor, nn

from tersor.boundary import entrances
from tersor.errors import RefusedError, SettingError
from tersor.forms import Dense, Form, Grid, Masked, Node
from tersor.forms.form import DIGEST
from tersor.model.changes import Replace, Set
from tersor.model.given_model import given_model
from tersor.model.module_writer import write_module
from tersor.model.packed_module import styled
from tersor.model.simulate import with_grids
from tersor.model.sites import Site, known
from tersor.model.task import Task
from tersor.model.tensors import with_memory
from tersor.model.versions import with_versions
from tersor.model.wrapped import inside
from tersor.record.brief import BriefState
from tersor.record.ledger import START, Entry, Ledger

Kept = Mapping[int, tuple[int, ...]]  # axis -> the given index of each index that is present


@dataclass(frozen=True, repr=False)
class Base:
    """The weights as they were first given."""

    sites: Mapping[str, Site]
    forms: Mapping[str, Form]
    aliases: Mapping[str, str]


@entrances("plain", "model", "on", "state_dict")
@dataclass(frozen=True, repr=False)
class State(BriefState):
    """A compressed model. It is never changed: the executor makes a new one."""

    sites: Mapping[str, Site]  # shapes as given; a site that a replacement made has an `origin`
    forms: Mapping[str, Form]
    aliases: Mapping[str, str]  # other names of tied tensors -> site
    ledger: Ledger
    given: nn.Module | None = None  # the module as it was first given; None for a file, which has no code
    base: Base | None = None  # None for a file whose first weights were not given with it
    kept: Mapping[str, Kept] = field(default_factory=dict)  # by site, for sites that were cut
    changes: tuple[Set | Replace, ...] = ()  # of modules, in order
    grids: Mapping[str, Grid] = field(default_factory=dict)  # by edge
    attachments: Mapping[str, bytes] = field(default_factory=dict)  # named files that go with the weights

    def shape(self, site: str) -> tuple[int, ...]:
        """The current shape; Site.shape is the given one."""
        return tuple(self.forms[known(site, self.forms)].shape)

    def present(self, site: str, axis: int) -> tuple[int, ...]:
        """The given index of each index that is present along an axis."""
        return self.kept.get(site, {}).get(axis) or self.sites[known(site, self.sites)].indices(axis)

    def plain(self, given: nn.Module | None = None) -> nn.Module:
        """A copy of the given model with the decoded weights, cuts and replacements, without the grids."""
        module = self.given if given is None else given
        if module is None:
            raise SettingError("a file holds weights, not code: give the model, model(MyNet())")
        return write_module(with_memory(inside(module)), self.forms, self.sites, self.aliases, self.changes)

    def model(self, given: nn.Module | None = None, *, style: str = "plain") -> nn.Module:
        """The model of this state. If edges have grids, it simulates them. A state from a file needs `given`:
        a model of the class that was compressed, with any weights. `style`: "packed" keeps weights on uniform
        grids as codes and decodes a layer at a time (packed_module.py)."""
        return with_grids(styled(self.plain(given), self.forms, style, self.grids), self.grids)

    def on(self, module: nn.Module) -> Self:
        """A state from a file with its code. It gets a base too if the module has the weights that the ledger
        began with."""
        found = start(module)
        same = found.digest == self.ledger.base
        return replace(self, given=found.given, base=found.base if same else None)

    def state_dict(self) -> dict[str, Tensor]:
        """The decoded weights by their names in the model, aliases too."""
        decoded = {name: form.decode().to(self.sites[name].torch_dtype) for name, form in self.forms.items()}
        decoded |= {alias: decoded[name] for alias, name in self.aliases.items()}
        return with_versions(decoded, self.given, self.attachments)

    @property
    def trail(self) -> str:
        """Digests of the state and its history. A journal resumes only from a state with the same trail."""
        return f"{self.digest} {self.ledger.digest}" if self.ledger.count else self.digest

    @property
    def nodes(self) -> dict[str, Node]:
        """Forms and grids, by site and edge."""
        return {**self.forms, **self.grids}

    @property
    def nbytes(self) -> int:
        """Bytes of all stored arrays, without file headers."""
        return sum(node.nbytes for node in self.nodes.values())

    @property
    def given_nbytes(self) -> int | None:
        """Bytes of the tensors as first given. None for a file without them if modules were replaced."""
        if self.base is not None:
            return sum(form.nbytes for form in self.base.forms.values())
        if any(isinstance(change, Replace) for change in self.changes):
            return None
        return sum(math.prod(site.shape) * site.torch_dtype.itemsize for site in self.sites.values())

    @property
    def digest(self) -> str:
        """Changes when any weight, cut, replacement or grid changes."""
        rest: dict[str, Any] = {}
        if self.kept or self.changes or self.grids:
            rest = {"kept": self.kept, "changes": [[type(c).__name__, vars(c)] for c in self.changes]}
            rest |= {"grids": {edge: grid.digest for edge, grid in sorted(self.grids.items())}}
        return digest_of({name: form.digest for name, form in self.forms.items()}, rest)


def digest_of(digests: Mapping[str, str], rest: Mapping[str, Any] | None = None) -> str:
    """One digest of all forms (from their digests by name) and of `rest`."""
    text = "\n".join(f"{name} {digest}" for name, digest in sorted(digests.items()))
    text += json.dumps(rest, sort_keys=True, default=dict) if rest else ""
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST]


def start(model: nn.Module, task: Task | None = None) -> State:
    """The state of a model as it is: every tensor Dense, or Masked if the model has it pruned. NaN and
    infinite weights are refused. Roles of tensors are found with the inputs of `task`, else from the classes
    of layers. Wrappers of torch.compile and data parallelism are removed."""
    # The forms share the module's tensors, since neither is ever changed.
    found = given_model(inside(model), task)
    forms: dict[str, Form] = {name: Dense(tensor.cpu()) for name, tensor in found.tensors.items()}
    forms |= {name: Masked(Dense(mask.cpu()), forms[name]) for name, mask in found.masks.items()}
    digest = digest_of({name: form.digest for name, form in forms.items()})
    notes = [Entry(0, START, "", kind=kind, text=text) for kind, text in found.notes.items()]
    ledger = Ledger(digest, entries=notes)
    base = Base(found.sites, forms, found.aliases)
    return State(found.sites, forms, found.aliases, ledger, found.module, base)


def known_base(state: State, who: str) -> Base:
    """The weights as they were first given. RefusedError for a file without them."""
    if state.base is None:
        raise RefusedError(
            f"{who}: needs the model as it was first given (digest {state.ledger.base}), and the file holds "
            f"only the compressed one. Give the model with the first weights: "
            f"load(file).on(model), or --base WEIGHTS on the command line"
        )
    return state.base
