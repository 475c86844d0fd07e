"""Integers: quantize with activations=8, for kernels that compute with integers.

in order   batch norms are folded, channels balanced (balance.py), inputs of linear layers smoothed
           (smoothing.py); weights rounded; grids of activations calibrated (activations.py); biases corrected
           for what both move (corrected_biases.py) and rounded; what 16 bits would clip (saturated.py)
With dynamic ranges nothing is folded, balanced or corrected: no grid is known before the model runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from tersor.core.view import View
from tersor.forms import Form
from tersor.model.integer_weights import integer_weight
from tersor.record.events import Edit, Group, Note
from tersor.steps.activations import (
    Calibration,
    calibrated,
    check_grids,
    choice,
    dynamic,
    expected_grids,
    folded,
)
from tersor.steps.balance import channels_balanced
from tersor.steps.calibration_shift import shifts
from tersor.steps.corrected_biases import corrected_biases
from tersor.steps.few_bits import advice
from tersor.steps.saturated import warned
from tersor.steps.smoothing import smoothed

DYNAMIC = "dynamic"  # ranges of activations that are found when the model runs


def integers(step: Any, view: View) -> Iterator[Group]:
    """Weights and activations as integers. Weights that are integers already keep their codes."""
    chosen = {site.name for site in view.weights(step.where)}
    moving, now = step.activation_range == DYNAMIC, view
    edges: list[str] = []
    unscaled: View | None = None  # before the channels were balanced
    check_grids(view, moving)
    if not moving:
        now = yield from folded(view, chosen)
        if step.balance and not view.state.grids:
            edges, unscaled = choice(now, chosen, products=step.products == "integer").edges, now
            now = yield from channels_balanced(now, edges, chosen, step.bits)
    if step.smooth and moving and view.task.calibrate is None:
        text = "inputs are not smoothed: that needs calibration batches, and the task has none"
        yield Group("not smoothed", (Note("", "smoothed", text, {"noise": {}}),))
    elif step.smooth:
        layers = choice(now, chosen, dynamic=moving, products=step.products == "integer").layers
        now = yield from smoothed(now, layers, step.bits, step.activations, dynamic=moving)
    exact = now
    how = Calibration(
        step.activations, step.activation_range, step.activation_percentile, step.products == "integer"
    )
    sites = [s for s in now.weights(step.where) if isinstance(integer_weight(now.form(s)), str)]
    edits, about = dict[str, Edit](), advice(step, view) if sites else ()
    if step.rounding != "nearest":
        simulate = step.rounding == "brecq" and sites
        made = step.compensated(
            now, sites, expected_grids(now, chosen, None if moving else how) if simulate else {}
        )
        after, hows, about = made.forms, made.hows, tuple(made.notes())
    else:
        edits = {site.name: step.edit(now, site) for site in sites}
        after = {name: cast(Form, edit.after) for name, edit in edits.items()}
        hows = {name: edit.how for name, edit in edits.items()}
    if moving:
        rounded = dynamic(now, after, chosen)
    else:
        rounded = calibrated(now, after, chosen, how)
        # Scales fit the calibration batches, so other data of the same kind would look unlike them.
        shown = now.part.plain(after) if unscaled is None else unscaled.part.plain()
        compared = [edge for edge in rounded.grids if unscaled is None or edge in edges]
        about = (*about, *shifts(shown, now.part.task, compared))
        if step.correct and not step.epochs:
            about = (*about, *corrected_biases(now, rounded))
    trained: tuple[Note, ...] = ()
    if step.epochs:
        grids = Group("grids", tuple(rounded.events({}, forms=False)))
        yield grids
        now = now.after(grids)
        after, events = step.retrained(now, edits)
        trained = tuple(event for event in events if isinstance(event, Note))
        rounded = rounded.after_training(now, after)
    for layer in rounded.layers:
        rounded.bias(layer)
    notes = [step.note(name, exact.form(name), rounded.form(name)) for name in exact.forms if name in chosen]
    events = (*rounded.events(hows), *notes)
    clipped = () if moving or step.activations > 8 else warned(now.after(Group("all", events)), exact)
    yield Group("all", (*events, *about, *rounded.notes(), *clipped, *trained))
