"""Program modes: which operators of a graph compute another thing in training mode, and which are in it.

dropout(x, 0.5, train=False)       nothing now, random in training
dropout(x, 0.5, train=True)        the trace was of training mode
instance_norm(use_input_stats=True, running_mean=...)   moves statistics: so was this one
Chances of 0 and norms without statistics are the same in both modes. An operator for attention has the
chance 0 in eval mode, so its own is not known.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from tersor.model.graph import arguments

MODES = ("training", "train", "use_input_stats")  # what operators call it
CHANCES = ("p", "dropout")


def training(node: fx.Node) -> bool:
    """Whether this operator computes what it does in training mode only."""
    given = arguments(node)
    chance = given.get("dropout_p")  # of attention: it has no mode
    if chance is not None and chance != 0:
        return True
    return any(given.get(mode) is True for mode in MODES) and differs(given)


def asleep(node: fx.Node) -> bool:
    """Whether this operator, in eval mode now, would compute another thing in training mode."""
    given = arguments(node)
    return any(given.get(mode) is False for mode in MODES) and differs(given)


def differs(given: dict[str, Any]) -> bool:
    """Whether an operator that knows its mode depends on it."""
    if "running_mean" in given:
        return given["running_mean"] is not None
    return next((given[key] for key in CHANCES if key in given), 1) != 0  # rrelu has none: it is random
