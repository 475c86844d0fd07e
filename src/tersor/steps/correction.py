"""Correction: refit layers after a structural change by least squares, and settle batch norms: no labels.

Each layer is refitted to what it gave before the change, on the inputs that it gets now, in order
(model/channels/reconstruct.py). It is kept only if the outputs come nearer to those before.
Cost: a pass of both models over the calibration batches for each layer.
"""

from __future__ import annotations

from tersor.core.view import View
from tersor.errors import counted
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
    """Edits of these layers, refitted, and of the statistics of batch norms; frozen ones stay. In a model of
    which all is frozen, as one that was loaded for inference, that says nothing about any."""
    own = [name for name, site in now.sites.items() if site.is_parameter]
    fixed = still.tensors if any(name not in still.tensors for name in own) else ()
    plain = [
        layer for layer in layers
        if isinstance(now.form(f"{layer.path}.weight"), Dense) and f"{layer.path}.weight" not in fixed
    ]  # fmt: skip
    plain = [
        each._replace(
            norm="" if each.norm in still.modules else each.norm,  # the mean of one that rests stays
            still=f"{each.path}.bias" in fixed,
        )
        for each in plain
    ]
    task = before.part.task  # of a part: the inputs that it had
    given, after = before.part.plain(), now.part.plain()
    cut = apart(given, after, task)
    values = refitted(given, after, task, plain, now.observer.progress)
    error = apart(given, after, task)
    settled = settled_norms(after, task, still.modules)
    best = apart(given, after, task) if settled else error
    if min(best, error) >= cut:
        values = {}
    elif best < error:  # few batches may tell less than the statistics had
        values |= settled
    forms: dict[str, Form] = {}
    for name, value in values.items():
        if name not in now.forms or name in fixed or not isinstance(now.form(name), Dense):
            continue
        if now.sites[name].kind != "buffer" or name.rpartition(".")[0] not in still.modules:
            # eval() freezes statistics, not weights
            old = now.forms[name].decode().dtype  # 16-bit floats stay so
            short = value.to("cpu", old)
            fits = old.itemsize == 2 and bool(short.isfinite().all())
            forms[name] = Dense(short if fits else value.to("cpu", now.sites[name].torch_dtype))
    forms = {name: form for name, form in forms.items() if form.digest != now.forms[name].digest}
    text = f"{counted(len(plain), 'layer')} refitted to what they gave before, {on_which(now.task)}"
    if not forms:
        text = "refitting does not bring the outputs nearer to those before, so nothing is refitted"
    if len(plain) < len(layers):
        text += f"; {len(layers) - len(plain)} left: they are masked, quantized or frozen"
    return Group(key, (*now.edits(forms), Note("", "corrected", text, {"layers": len(plain)})))
