"""Needs: what a step, as it is set, cannot work without; a task is checked for it before anything starts."""

from __future__ import annotations

import enum


class Needs(enum.Flag):
    """What a step, as it is set, cannot work without. One that needs nothing works site by site."""

    NOTHING = 0
    MODEL = enum.auto()  # the module itself, not only its weights
    TASK = enum.auto()  # batches to show the model
    TRAINING = enum.auto()  # batches to train with
    WHOLE = enum.auto()  # all weights at once
    LOSS = enum.auto()  # the task's loss, in training
    SOFT = enum.auto()  # logits that are compared with a teacher's, in training
    SCORES = enum.auto()  # evaluation batches and a metric, where the run has a task
