"""Scored: one pass over a task's evaluation set: scores, and what the model decides at each position.

decision   classes: the largest score     binary: whether the score is above 0     other outputs have none
Positions that do not count (targets of -100, padding) have no decision. Cost: the forward passes; a decision
takes 4 bytes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tersor.candidates.candidate import Candidate
from tersor.errors import TaskError
from tersor.model.causal import causal, moved
from tersor.model.logits import IGNORED, Logits, not_ignored, not_padding
from tersor.model.outputs import as_floats
from tersor.model.task import Task
from tersor.record.observer import Observer


@dataclass(frozen=True)
class Scored:
    """The results of one candidate."""

    scores: Any  # as Task.scores returns them
    decisions: Tensor | None  # int32 [positions of all samples that count]; None if its outputs are none
    why: str  # why there are no decisions
    seconds: float  # of the whole pass, metric included


def scored(of: Candidate, task: Task, observer: Observer, *, decide: bool = False) -> Scored:
    """Score a candidate on the task's evaluation set; with `decide` keep its decisions too. TaskError if the
    task does not fit it."""
    found: list[Tensor | None] = []
    why = ""

    def see(output: Any, batch: Any) -> None:
        nonlocal why
        target = task.maybe_target(batch)
        if of.state is None and task.target is None:
            refuse_unshifted(of, target, batch)
        if decide and not why:
            try:
                found.append(decisions(task, as_floats(output), target, batch))
            except TaskError as error:
                why = str(error)

    def watch(done: int, total: int | None) -> None:
        if total is not None:
            observer.progress(done, total, of.name)

    began = time.perf_counter()
    scores = task.scores(of.module, watch, see)
    seconds = time.perf_counter() - began
    if decide and not why and any(item is None for item in found):
        why = "its outputs are numbers, not classes"
    whole = [item for item in found if item is not None]
    return Scored(scores, torch.cat(whole) if whole and not why else None, why, seconds)


def decisions(task: Task, output: Any, target: Any, batch: Any) -> Tensor | None:
    """The decisions for one batch, int32 [positions that count]; None for outputs that are not classes.
    TaskError if it is ambiguous which tensor holds them."""
    shifts = causal(output, target, batch)
    found = []
    for logits in task.logits_of(output, target, task.scored.kind):
        goal, mask = target, not_padding(logits, output, batch)
        if shifts:
            logits, goal, mask = moved(logits, target, mask)
        chosen = decided(logits)
        if chosen is None:
            return None
        for counts in (mask, not_ignored(logits, goal)):
            if counts is not None and counts.shape == chosen.shape:
                chosen = chosen.masked_fill(~counts, IGNORED)
        found.append(chosen[chosen != IGNORED].flatten().int().cpu())
    return torch.cat(found)


def decided(logits: Logits) -> Tensor | None:
    """The decision at each place of the logits."""
    if logits.kind == "classes":
        return logits.scores.argmax(1)  # [B, ...]
    return (logits.tensor > 0).int() if logits.kind == "binary" else None


def refuse_unshifted(of: Candidate, target: Any, batch: Any) -> None:
    """Refuse labels that are the tokens themselves. The class of a causal model's output says that its scores
    are of the next token; a runtime's file has no class, and would be scored for copying its input."""
    ids = batch.get("input_ids") if isinstance(batch, dict) else None
    if not isinstance(ids, Tensor) or not isinstance(target, Tensor) or ids.shape != target.shape:
        return
    counts = target != IGNORED
    if bool(counts.any()) and bool((target == ids)[counts].all()):
        raise TaskError(
            f"{of.name}: the targets are the input tokens themselves, and a runtime's file does not tell "
            "whether its scores are of the next token. Give the task target=(batch) -> the next tokens, with "
            "-100 at the last place"
        )
