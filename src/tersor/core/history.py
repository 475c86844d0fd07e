"""History: undo and replay, from a ledger, a journal and the first weights.

undo      lossless steps are undone from the state, all steps from the first weights, others from the
          journal of the run
replay    apply the groups of a journal to the model that its run began with, without computing them again
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from tersor.core.apply import apply
from tersor.core.recipe import Recipe
from tersor.core.state import State, known_base, start
from tersor.errors import JournalError, RefusedError, SettingError
from tersor.forms import uncoded
from tersor.record.journal import lines_of
from tersor.record.ledger import START, Ledger

Journals = str | Path | Sequence[str | Path]


def undo(state: State, steps: int | None = None, *, journal: Journals = ()) -> State:
    """The state before the last `steps` steps of the ledger (default: before all), bit for bit.

    Past forms are not held in memory. Unless the steps are lossless, or all steps are undone, this needs the
    `journal` of the run that began with the model. If runs continued earlier runs, it needs the journals of
    all of them in order. RefusedError without them.
    """
    ledger = state.ledger
    first = 0 if steps is None else ledger.count - steps
    if first < 0 or (steps is not None and steps < 0):
        raise SettingError(f"undo: steps={steps}, but the ledger has {ledger.count} steps")
    if first == ledger.count:
        return state
    if first == 0 and (state.base is not None or ledger.past):
        return first_given(state)
    if first < len(ledger.past):
        raise RefusedError(
            f"undo: the file keeps only the names of the first {len(ledger.past)} steps. Undo at most "
            f"{ledger.count - len(ledger.past)} steps, or all of them with the first weights"
        )
    if journal:
        return rebuilt(state, first, journal)
    changes = [entry for entry in ledger.entries if entry.step >= first and entry.changes]
    if all(entry.how == "lossless" for entry in changes):
        return without_coding(state, first, {entry.site: entry.before for entry in reversed(changes)})
    if first == 0:
        return first_given(state)
    raise RefusedError(
        f"undo: steps={steps} includes steps that changed weights, and only a journal keeps past weights. "
        f"Give it: undo(state, {steps}, journal=FOLDER); or undo all steps with the first weights"
    )


def first_given(state: State) -> State:
    """The state before the first step. RefusedError for a file without its first weights."""
    base = known_base(state, "undo")
    return State(base.sites, base.forms, base.aliases, state.ledger.until(0), state.given, base)


def without_coding(state: State, first: int, before: dict[str, str]) -> State:
    """The forms before lossless edits; `before`: their digests. Coding drops hidden elements, which are zero
    now: such a form decodes to the same bits but has another digest, which goes into the ledger.
    """
    forms, ledger = dict(state.forms), state.ledger.until(first)
    for site, digest in before.items():
        plain = uncoded(forms[site])
        masked = any(node.mask for _, node in plain.walk())
        if digest not in (plain.digest, forms[site].digest) and not masked:
            raise RefusedError(
                f"undo: {site}: the earlier form was coded in another way; give the journal: journal=FOLDER"
            )
        forms[site] = forms[site] if forms[site].digest == digest else plain
        ledger = ledger.ending(site, forms[site].digest)
    return replace(state, forms=forms, ledger=ledger)


def rebuilt(state: State, first: int, journal: Journals) -> State:
    """The state after the ledger's first steps, from the journals of all runs since the given model."""
    begun, done = first_given(state), 0
    wanted, names = state.ledger.until(first), state.ledger.step_names()
    found = replace(wanted, entries=[entry for entry in wanted.entries if entry.name == START])
    for folder in [journal] if isinstance(journal, (str, Path)) else journal:
        lines = lines_of(folder)
        for line in lines:
            if done + line.step < first:
                group = line.group()
                begun, digests = apply(begun, group, "undo")
                found.record(done + line.step, names[done + line.step], group, digests)
        done += sum(line.seconds is not None for line in lines)
    if done < first:
        raise JournalError(
            f"undo: the journals hold {done} finished steps, and {first} are needed. Give the journals of "
            f"all runs since the given model, in order"
        )
    if found.digest != wanted.digest:
        raise JournalError("undo: this journal belongs to another run: its groups differ from the ledger")
    return replace(begun, ledger=wanted, attachments=state.attachments)


def replay(model: nn.Module | State, ledger: Ledger, journal: Journals) -> State:
    """Apply the groups of journals to the model that their first run began with. Nothing is computed again.
    RefusedError for another model."""
    given = model if isinstance(model, State) else start(model)
    if given.digest != ledger.base:
        raise RefusedError(f"replay: the ledger begins with model {ledger.base}, this one is {given.digest}")
    return rebuilt(replace(given, ledger=ledger), ledger.count, journal)


def compare_lock(recipe: Recipe, result: State) -> None:
    """Refuse a result that differs from the lock."""
    for site, digest in recipe.result:
        found = result.forms[site].digest if site in result.forms else "no such site"
        if found != digest:
            raise RefusedError(
                f"lock: the result for {site} is {found}, the lock says {digest}: another machine or data"
            )
