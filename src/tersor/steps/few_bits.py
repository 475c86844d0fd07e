"""Few bits: what is said where few bits are rounded to the nearest, and a better way is known."""

from __future__ import annotations

from typing import Any

from tersor.core.view import View
from tersor.record.events import Note

FEW = 4  # bits from which on rounding to the nearest is far from the best
SCHEMES = ("uniform", "log")


def better(step: Any, data: bool = False) -> str:
    """The better way than a Quantize step, as a sentence; "" if none is known. `data`: whether there are
    calibration batches."""
    if step.scheme not in SCHEMES or step.bits > FEW or step.epochs or step.range == "fixed":
        return ""
    if step.rounding != "nearest" or step.allowed is not None:
        return ""
    way = f"rdoq bits={step.bits}"
    if step.activations:  # integer kernels take one scale for each channel
        way += " per=channel before this step"
    if data and step.scheme == "uniform":
        way = f"rounding=gptq or {way}"
    return f"{step.bits} bits are rounded to the nearest; {way} loses less: docs/which.md"


def advice(step: Any, view: View) -> tuple[Note, ...]:
    """The note of a Quantize step. Only a task with calibration batches brings it into the ledger, which is
    the same for a model, for its file, and for tensors that are packed one by one."""
    task = view.maybe_task
    text = better(step, data=True) if task is not None and task.calibrate is not None else ""
    return (Note("", "advice", text),) if text else ()
