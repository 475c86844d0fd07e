"""Own training: the step in the ledger that records a user's own training loop.

module = trainable(state)     an nn.Module with the model's signature, with masks, tables, grids and factors
state = folded(module)        the state with the learned values, and a step "trained" in its ledger
Any loop, optimizer or trainer can run between the two calls. The executor checks the result as it does for
steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from tersor.core.recipe import Recipe
from tersor.core.run import Executor
from tersor.core.state import State
from tersor.core.step import Needs
from tersor.core.view import View
from tersor.errors import SettingError, did_you_mean
from tersor.forms import Form
from tersor.model.frozen import FROZEN, Frozen, frozen_in
from tersor.model.given_masks import with_masks
from tersor.model.grid_part import outdated
from tersor.model.simulate import refuse_stale
from tersor.model.trainable_module import Source, Trainable, unwrapped
from tersor.record.events import Edit, Group, Note


def trainable(
    state: State, model: nn.Module | None = None, *, frozen: str = "stay", zeros: str = "*",
    example: Callable[[nn.Module], Any] | None = None,
) -> Trainable:  # fmt: skip
    """The state's model for a loop of your own, in training mode; the state and the model stay as they are.

    `model`: the module of a state from a file. `frozen`: whether what the model has frozen
    (requires_grad=False, modules in eval mode) is to "stay" frozen or to "train". `zeros`: the weights that
    keep the zeros that they were given with, as in a recipe: a glob, or "none". `example` runs the model
    once, such as lambda net: net(x). A state with grids on edges needs it, to check that training has the
    same edges. SettingError for wrong arguments.
    """
    if not isinstance(state, State):
        raise SettingError(
            f"trainable: given a {type(state).__name__}, but it takes a state, as run(...) and load(...) "
            f"return. For a model: trainable(run(model, steps))"
        )
    if frozen not in FROZEN:
        raise SettingError(f"trainable: frozen={frozen!r}; {did_you_mean(frozen, FROZEN)}")
    if not isinstance(zeros, str) or not zeros:
        raise SettingError(f"trainable: zeros={zeros!r}, but it is a glob such as '*', or 'none'")
    state = state if model is None else state.on(model)
    if state.given is None:
        raise SettingError(
            "trainable: a file holds weights, not code: give the model too, trainable(state, model)"
        )
    refuse_stale(state.grids)
    # A module that does not fit a file is refused here, not in the middle of a loop.
    plain = state.kept or state.changes or model is not None
    module = state.plain() if plain else state.given
    still = frozen_in(module, state.sites) if frozen == "stay" else Frozen()
    learn = still.learning(state.sites.values(), "trainable")
    forms = {
        **state.forms,
        **with_masks(state.sites, state.forms, zeros),
    }  # the executor does the same in folded
    made = Trainable(
        module, forms, state.sites, learn, resting=still.modules, edge_grids=state.grids,
        example=example,
    )  # fmt: skip
    made.source, made.frozen, made.zeros = Source(state), still, zeros
    made.remember()
    made.train()
    return made


def folded(module: nn.Module) -> State:
    """The state with the current values of a module made by trainable(...). The module is not changed, and
    may be wrapped (DistributedDataParallel, torch.compile). RefusedError if tensors of it are gone, or became
    others: on the meta device, of another shape."""
    inner = unwrapped(module)
    inner.check_whole()
    state: State = inner.source.state
    return Executor(state, Recipe((Trained(inner),), zeros=inner.zeros)).run()


@dataclass(frozen=True)
class Trained:
    """A step that has happened already: the result of a user's own training loop."""

    name: ClassVar[str] = "trained"
    where: ClassVar[str] = "*"
    needs: ClassVar[Needs] = Needs.NOTHING

    def __init__(self, module: Trainable):
        object.__setattr__(self, "module", module)

    def run(self, view: View) -> Iterator[Group]:
        module: Trainable = self.module  # type: ignore[attr-defined]
        after = module.fold()
        moved = {name: form for name, form in after.items() if differ(form, view.form(name))}
        events: list[Edit | Note] = list(view.edits(moved))
        # Edits of weights make grids stale, but these grids were simulated while the weights learned.
        for edge, grid in module.fold_grids().items():
            before = view.state.grids[edge]
            before = outdated(before) if events else before
            if grid.digest != before.digest:
                events.append(Edit(edge, before, grid, "refine"))
        count = len({event.site for event in events})
        text, data = module.frozen.summary()
        notes = [Note("", "trained", f"in a loop of one's own: {count} moved")]
        notes += [Note("", "frozen", text, data)] if text else []
        yield Group("all", (*events, *notes))


def differ(after: Form, before: Form) -> bool:
    """Whether two forms decode to different numbers. Hidden elements do not count."""
    return after.digest != before.digest and not torch.equal(after.decode(), before.decode())
