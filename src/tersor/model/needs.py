"""Needs: what a step with its settings requires of a run; a task is checked for it before anything starts."""

from __future__ import annotations

import enum


class Needs(enum.Flag):
    """What a step with its settings requires. A step that needs nothing works site by site."""

    NOTHING = 0
    MODEL = enum.auto()  # the module itself, not only its weights
    TASK = enum.auto()  # batches to show the model
    TRAINING = enum.auto()  # batches to train with
    WHOLE = enum.auto()  # all weights at once
    LOSS = enum.auto()  # the task's loss, in training
    SOFT = enum.auto()  # logits that can be compared with a teacher's, in training
    EXAMPLE = enum.auto()  # inputs of the model, to trace it with; no data
    SCORES = enum.auto()  # evaluation batches and a metric, if the run has a task
