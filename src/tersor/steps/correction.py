"""Correction: refit layers after a structural change by least squares, and settle batch norms: no labels.

Each layer is refitted to what it gave before the change, on the inputs that it gets now, in order
(model/channels/reconstruct.py). It is kept only if the outputs come nearer to those before.
Cost: a pass of both models over the calibration batches for each layer.
"""

from __future__ import annotations

from tersor.core.view import View
from tersor.forms import Dense, Form
from tersor.model.channels.reconstruct import Layer, apart, refitted, settled_norms
from tersor.model.frozen import Frozen
from tersor.model.task import Task
from tersor.record.events import Group, Note


def on_which(task: Task) -> str:
    """The batches that layers are refitted on, in words. The evaluation set should not be among them."""
    if task.shown == "calibrate":
        return "on calibration batches"
    return (
        "on evaluation batches, as the task has no others for it: scores on them are then too good. Give "
        "Task(calibrate=...)"
    )


def corrected(key: str, before: View, now: View, layers: list[Layer], still: Frozen) -> Group:
    """Edits of these layers, refitted, and of the statistics of batch norms; frozen ones stay."""
    plain = [
        layer for layer in layers
        if isinstance(now.form(f"{layer.path}.weight"), Dense) and f"{layer.path}.weight" not in still.tensors
    ]  # fmt: skip
    task = before.part.task  # of a part: the inputs that it had
    given, after = before.part.plain(), now.part.plain()
    cut = apart(given, after, task)
    values = refitted(given, after, task, plain, now.observer.progress)
    error = apart(given, after, task)
    settled = settled_norms(after, task)
    best = apart(given, after, task) if settled else error
    if min(best, error) >= cut:
        values = {}
    elif best < error:  # few batches may tell less than the statistics had
        values |= settled
    forms: dict[str, Form] = {}
    for name, value in values.items():
        rests = name in still.tensors or name.rpartition(".")[0] in still.modules
        if name in now.forms and isinstance(now.form(name), Dense) and not rests:
            forms[name] = Dense(value.to("cpu", now.sites[name].torch_dtype))  # forms live there
    forms = {name: form for name, form in forms.items() if form.digest != now.forms[name].digest}
    text = f"{len(plain)} layers refitted to what they gave before, {on_which(now.task)}"
    if not forms:
        text = "refitting does not bring the outputs nearer to those before, so nothing is refitted"
    if len(plain) < len(layers):
        text += f"; {len(layers) - len(plain)} left: they are masked, quantized or frozen"
    return Group(key, (*now.edits(forms), Note("", "corrected", text, {"layers": len(plain)})))
