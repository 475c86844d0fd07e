"""Grid order: whether a recipe changes weights after it rounded activations, which makes the ranges stale.

quantize activations=8, prune, measure      refused before anything runs: the model cannot run in between
quantize activations=8, finetune            fine: a step that trains under the grids keeps them
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tersor.errors import SettingError
from tersor.model.needs import Needs

KEEPS = ("fold",)  # may change nothing, so it is judged when it runs


def changes_ranges(step: Any) -> bool:
    """Whether a step changes weights without keeping the ranges of activations."""
    return not getattr(step, "lossless", False) and not getattr(step, "epochs", 0)


def runs_grids(step: Any) -> bool:
    """Whether a step runs the model with its grids: it scores, trains or exports. Others run without."""
    exports = getattr(step, "lossless", False) and step.needs & (Needs.MODEL | Needs.TASK)
    return bool(exports or step.needs & (Needs.SCORES | Needs.TRAINING))


def refuse_order(steps: Sequence[Any], measured: bool = False) -> None:
    """SettingError for a recipe in which a step needs the model while its ranges are stale. `measured`: the
    result is measured at the end."""
    rounded = after = ""
    for number, step in enumerate(steps, 1):
        here = f"step {number} {step.name}"
        if getattr(step, "activations", 0):
            rounded, after = "" if step.activation_range == "dynamic" else here, ""  # those stay true
        elif after and runs_grids(step):
            raise refusal(rounded, after, f"{here} needs the model")
        elif rounded and changes_ranges(step) and step.name not in KEEPS:
            after = after or here
    if after and measured:
        raise refusal(rounded, after, "the result is measured at the end")


def refusal(rounded: str, after: str, why: str) -> SettingError:
    return SettingError(
        f"recipe: {after} changes weights after {rounded} has measured the ranges of activations, so these "
        f"no longer hold, and {why}. Put {rounded.rsplit(maxsplit=1)[-1]} activations=... after it"
    )
