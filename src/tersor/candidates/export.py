"""Export: write a candidate for a runtime, by the same step as a recipe's `export`, with its checks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import starmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.candidates.candidate import Candidate
from tersor.core.run import run
from tersor.core.state import State
from tersor.errors import RefusedError, SettingError, did_you_mean
from tersor.files import Paths, output
from tersor.model.batches import MISFIT, evaluating, fits
from tersor.model.task import Task
from tersor.record.observer import Observer
from tersor.steps import Export

KINDS = {str(kind).removeprefix("torch."): kind for kind in (
    torch.float32, torch.float16, torch.float64, torch.int64, torch.int32, torch.bool
)}  # fmt: skip
TABLE = 2  # whole numbers in an input of a model without an embedding: 0 and 1


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
    if task is not None and len(task.parts) > 1:
        raise RefusedError(
            f"export: the task names {len(task.parts)} parts, {', '.join(task.parts)}, and a file holds one. "
            f"Give a task that names one, part={task.parts[0]!r}, for each file"
        )
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
    kinds = [kind_of(text) for text in shapes]
    example = tuple(starmap(partial(drawn, TABLE), kinds))
    # Token ids must be in the table that they select rows of: the largest first.
    tables = {each.num_embeddings for each in of.module.modules() if isinstance(each, nn.Embedding)}
    for largest in (
        sorted(tables, reverse=True) if any(not kind.is_floating_point for kind, _ in kinds) else ()
    ):
        tried = tuple(starmap(partial(drawn, largest), kinds))
        with suppress(*MISFIT), evaluating(of.module):
            of.module(*tried)
            example = tried
            break

    def once() -> None:
        with evaluating(of.module):
            of.module(*example)

    given = ", ".join(dict.fromkeys(str(kind).removeprefix("torch.") for kind, _ in kinds))
    fits(once, f"export: inputs of --shape {' '.join(shapes)} ({given}) do not fit the model "
               f"{type(of.module).__name__}; token ids are int64:1x128; for others give --task")  # fmt: skip
    return Task("--shape", evaluate=[(*example, torch.zeros(len(example[0])))], example=example)


def drawn(largest: int, kind: torch.dtype, shape: list[int]) -> Tensor:
    """An input: normal numbers, or whole ones from 0 to `largest` - 1; the same each time."""
    generator = torch.Generator().manual_seed(0)
    if kind.is_floating_point:
        return torch.randn(shape, generator=generator).to(kind)
    return torch.randint(2 if kind is torch.bool else largest, shape, generator=generator).to(kind)


def kind_of(text: str) -> tuple[torch.dtype, list[int]]:
    """The dtype and the sizes in "1x3x224x224" or "int64:1x128"."""
    word, colon, rest = text.rpartition(":")
    if colon and word not in KINDS:
        raise SettingError(f"export: --shape {text!r}: no input of {word!r}; {did_you_mean(word, KINDS)}")
    return KINDS[word] if colon else torch.float32, sizes(rest)


def sizes(text: str) -> list[int]:
    """The sizes in "1x3x224x224"."""
    parts = text.lower().split("x")
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise SettingError(
            f"export: --shape {text!r}, but it is the sizes of one input joined by x, the batch first: "
            "1x3x224x224, or int64:1x128 for token ids"
        )
    return [int(part) for part in parts]


def path_for(of: Candidate) -> Path:
    """Where an export goes if no file is named: beside the candidate's file."""
    return Path("model.onnx") if of.path is None else of.path.with_suffix(".onnx")
