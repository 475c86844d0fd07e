"""Branch costs: the residual branches of a view's model, what each costs, and how it can be removed.

macs, latency        of the operators that only the branch needs; latency from a table of measured operators
parameters, bytes    of the tensors that only the branch reads
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, fx, nn

from tersor.core.view import View
from tersor.errors import RefusedError, SiteError, first_line
from tersor.model.batches import MISFIT, evaluating
from tersor.model.branches import Branch, branches
from tersor.model.bypass import Bypass, Plan
from tersor.model.channels.costs import macs_of
from tersor.model.channels.own_module import close
from tersor.model.outputs import tensors_of
from tersor.model.zeroed_edges import with_zeros
from tersor.record.events import Group
from tersor.steps.slim_latency import operator_times
from tersor.steps.units import Timing, walk_of

OPERATORS = ("macs", "latency")  # costs of operators; the others are of tensors


class Costed(Timing, Protocol):
    """The settings of Shorten that say what costs are."""

    @property
    def of(self) -> str: ...


class Found:
    """The branches of a view's model, and their costs."""

    def __init__(self, view: View, step: Costed):
        view = view.part
        self.view, self.of, self.model = view, step.of, view.plain()
        self.walk, self.inputs = walk_of(view)
        aliases = view.state.aliases
        self.branches, self.no = branches(self.walk.graph, self.model, {*aliases, *aliases.values()})
        self.prices: dict[fx.Node, float] = {}  # of operators
        if step.of == "macs":
            self.prices = {node: n / self.samples for node, n in macs_of(self.walk).items()}
        elif step.of == "latency":
            self.prices = operator_times(self.walk.graph.nodes, step)
        self.bypass: Bypass | None = None

    @property
    def cost(self) -> float:
        """Of the whole model, or of its part; multiply-accumulates are those of one sample."""
        if self.of == "branches":
            return len(self.branches)
        if self.of in OPERATORS:
            return sum(self.prices.values())
        return sum(self.price(name) for name in self.view.sites if self.view.inside(name))

    @property
    def samples(self) -> int:
        leaves = self.inputs.values() if isinstance(self.inputs, dict) else self.inputs
        return next((len(x) for x in leaves if isinstance(x, Tensor) and x.ndim), 1)

    def saves(self, branch: Branch) -> float:
        if self.of == "branches":
            return 1
        if self.of in OPERATORS:
            return sum(self.prices.get(node, 0) for node in branch.nodes)
        return sum(self.price(name) for name in branch.tensors if name in self.view.sites)

    def weights(self, branch: Branch) -> set[str]:
        sites = self.view.sites
        return {name for name in branch.tensors if name in sites and sites[name].is_weight}

    def price(self, name: str) -> float:
        site, form = self.view.sites[name], self.view.form(name)
        if self.of == "bytes":
            return form.nbytes
        return float(torch.Size(form.shape).numel()) if site.kind != "buffer" else 0.0

    def called(self, model: nn.Module) -> list[Tensor]:
        with evaluating(model):
            out = model(**self.inputs) if isinstance(self.inputs, dict) else model(*self.inputs)
        return list(tensors_of(out))

    def plan(self, branch: Branch) -> Plan | str:
        """The first plan that gives what zeros in place of the branch give; else why there is none."""
        self.bypass = self.bypass or Bypass(self.walk.graph, self.view.plain(), self.called)
        wanted, why = self.called(with_zeros(self.view.plain(), {branch.edge})), ""
        for plan in self.bypass.plans(branch):
            try:
                got = self.called(self.view.after(Group("trial", plan, "runs")).plain())
            except (
                *MISFIT,
                RefusedError,
                SiteError,
            ) as error:  # the code meets modules that it does not expect
                why = why or f"without its layers the model does not run: {first_line(error)}"
                continue
            if len(got) == len(wanted) and all(map(same, got, wanted)):
                return plan
            why = why or "without its layers the model gives other outputs than with zeros in their place"
        return why or self.bypass.why_not(branch)

    def after(self, branch: Branch) -> set[str]:
        """The modules that run on what this branch was added to."""
        open_, seen = [branch.adds], {branch.adds}
        while open_:
            fresh = [user for user in open_.pop().users if user not in seen]
            seen.update(fresh)
            open_ += fresh
        return {self.walk.graph.path(node) for node in seen if node.op == "call_function"}


def same(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and x.dtype == y.dtype and close(x, y)
