"""Rounding search: rounding=auto of quantize. The cheapest way to round that keeps the task's metric.

ways     nearest, gptq, adaround, brecq, in the order of their cost, each as a trial
data     statistics from calibration batches that do not decide; the drop from samples that do not judge the
         result: drop_search.py
stop     at the first way whose drop is within max_drop
If none is, nothing is rounded: the step is refused, with the drop of each.
Cost: the ways up to the one that is taken, and that one again; a pass over the set that decides for each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from tersor.core.view import View
from tersor.errors import RefusedError, SettingError
from tersor.measure.accuracy import Drop
from tersor.record.events import Group, Note
from tersor.steps.drop_search import deciding

WAYS = ("nearest", "gptq", "adaround", "brecq")


def check_way(step: Any) -> None:
    """Refuse a limit of the drop that nothing searches for, and a search without one."""
    auto = step.rounding == "auto"
    if step.max_drop is not None and step.allowed is None and not auto:
        raise SettingError(
            f"quantize: max_drop={step.max_drop:g} has no effect if allowed=None and "
            f"rounding={step.rounding!r}. It needs allowed or rounding=auto: give one of them, or leave out "
            f"max_drop"
        )
    if auto and step.max_drop is None:
        raise SettingError(
            "quantize: rounding='auto' needs max_drop: it takes the first way to round that loses no more of "
            f"the metric. Give that, or one of rounding={', '.join(WAYS)}"
        )


def searched(step: Any, view: View) -> Iterator[Group]:
    """The groups of a Quantize step with rounding=auto."""
    decide = deciding(view.task, view.model(), step.max_drop, step.name)
    shown = replace(view, maybe_task=decide.rest, statistics={})
    drops: dict[str, Drop] = {}
    for number, word in enumerate(WAYS, 1):
        way = replace(step, rounding=word, max_drop=None)
        model = shown.trial([way], key=word)[1].model()
        drops[word] = decide.drop(model)
        view.observer.progress(number, len(WAYS), in_words({word: drops[word]}))
        if drops[word].high <= decide.limit:
            break
    else:
        unit = view.task.scored.unit
        raise RefusedError(
            f"{step.name}: no rounding to {step.bits} bits keeps the drop within max_drop={decide.limit:g}"
            f"{unit and f' {unit}'} on {decide.name}: {in_words(drops)}. Give more bits, per=group, a larger "
            f"max_drop, or epochs with rounding=nearest"
        )
    for group in way.run(shown):
        # Rounding to the nearest was good enough: no advice to take another way.
        events = tuple(e for e in group.events if not (isinstance(e, Note) and e.kind == "advice"))
        if events:
            yield replace(group, events=events)
    left = [other for other in WAYS if other not in drops]
    text = (
        f"rounding={word}: the first way in order of cost whose drop ends within max_drop={decide.limit:g}; "
    )
    text += in_words(drops) + (f"; not tried: {', '.join(left)}" if left else "")
    facts = {"rounding": word, "drops": {key: [d.amount, d.low, d.high] for key, d in drops.items()}}
    notes = Note("", "rounding", text, facts), decide.note(view.task, view.model(), model)
    yield Group("way to round", notes)


def in_words(drops: Mapping[str, Drop]) -> str:
    """ "nearest loses +1.2 (95 % interval +0.8 to +1.6), gptq loses ..."."""
    return ", ".join(
        f"{word} loses {d.amount:+.3g} (95 % interval {d.low:+.3g} to {d.high:+.3g})"
        for word, d in drops.items()
    )
