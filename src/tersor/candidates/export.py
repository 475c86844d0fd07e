"""Export: write a candidate for a runtime, by the same step as a recipe's `export`, with its checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tersor.candidates.candidate import Candidate
from tersor.core.run import run
from tersor.core.state import State
from tersor.errors import RefusedError, SettingError
from tersor.files import Paths, output
from tersor.model.batches import evaluating, fits
from tersor.model.task import Task
from tersor.record.observer import Observer
from tersor.steps import Export


def export(
    of: Candidate, path: str | Path, task: Task | None = None, *,
    shapes: Sequence[str] = (), to: str = "onnxruntime", weights: str = "packed",
    dynamic_batch: bool = True, dynamic_axes: str = "",
    observer: Observer | None = None, inputs: Paths = (),
) -> dict[str, Any]:  # fmt: skip
    """Write `of` to `path` for the runtime `to` and return the facts, as JSON: from, to, sha256, max_abs,
    agree and text (the step's own words); of weights stored as codes, packed: those that stay so in the
    runtime, and float: why others do not.

    The example input comes from the task, or has the `shapes` ("1x3x224x224", one for each input). With
    `dynamic_batch` the file takes batches of any size, with `dynamic_axes` ("1", "2,3") other sizes too.
    `inputs`: files that must not be overwritten. An earlier file stays as it was if the export is refused.
    """
    # An unknown runtime is refused first.
    check = Export(to=to, weights=weights, dynamic_batch=dynamic_batch, dynamic_axes=dynamic_axes)
    if of.state is None:
        raise RefusedError(
            f"export: {of.name} is a file for {of.kind} already. Give a .tersor file or a checkpoint"
        )
    if (task is None) == (not shapes):
        given = (
            "both --task and --shape are given. Give one" if shapes else "an example input is needed. Give"
        )
        raise SettingError(f"export: {given}: --task TASK, or --shape 1x3x224x224 for each input")
    path = output(path, inputs)
    found = write(of.state, task or shaped(of, shapes), path, check, observer)
    made = {"name": str(path), "runtime": to, "nbytes": found.pop("nbytes")}
    return {"from": of.facts, "to": made, **found}


def write(
    state: State, task: Task, path: Path, step: Export, observer: Observer | None = None
) -> dict[str, Any]:
    """Run the step on a state and return the data of its note."""
    folder = path.parent
    result = run(state, replace(step, path=path.name), task, out=folder, observer=observer)
    *_, note = result.ledger.notes("written")
    return {**note.data, "text": note.text}


def shaped(of: Candidate, shapes: Sequence[str]) -> Task:
    """A task whose only use is its example: inputs of these shapes, of normal numbers that are the same each
    time. TaskError if the model does not run on them."""
    drawn = torch.Generator().manual_seed(0)
    example = tuple(torch.randn(sizes(text), generator=drawn) for text in shapes)

    def once() -> None:
        with evaluating(of.module):
            of.module(*example)

    fits(once, f"export: inputs of --shape {' '.join(shapes)} (float32) do not fit the model "
               f"{type(of.module).__name__}; for other inputs give --task")  # fmt: skip
    return Task("--shape", evaluate=[(*example, torch.zeros(len(example[0])))], example=example)


def sizes(text: str) -> list[int]:
    """The sizes in "1x3x224x224"."""
    parts = text.lower().split("x")
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise SettingError(
            f"export: --shape {text!r}, but it is the sizes of one input joined by x, the batch first: "
            "1x3x224x224"
        )
    return [int(part) for part in parts]


def path_for(of: Candidate) -> Path:
    """Where an export goes if no file is named: beside the candidate's file."""
    return Path("model.onnx") if of.path is None else of.path.with_suffix(".onnx")
