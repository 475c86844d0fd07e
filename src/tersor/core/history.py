"""History: undo and replay: what a ledger, a journal and the first weights bring back.

undo      of lossless steps: from the state alone; of all: the first weights; else from the run's journal
replay    the groups of a journal on the model that its run began with, without computing them again
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

    Past forms are not held in memory: other than lossless steps, or all of them, need the `journal` of the
    run that began with the model (of runs that went on from runs, all theirs in order), or RefusedError says
    so.
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
            f"undo: of the first {len(ledger.past)} steps only names are left: a file keeps no more. Undo at "
            f"most {ledger.count - len(ledger.past)} steps, or all of them with the first weights"
        )
    if journal:
        return rebuilt(state, first, journal)
    changes = [entry for entry in ledger.entries if entry.step >= first and entry.changes]
    if all(entry.how == "lossless" for entry in changes):
        return without_coding(state, first, {entry.site: entry.before for entry in reversed(changes)})
    if first == 0:
        return first_given(state)
    raise RefusedError(
        f"undo: steps={steps} reaches back over steps that changed weights, and past weights are kept by a "
        f"journal only. Give it: undo(state, {steps}, journal=FOLDER); or undo all with the first weights"
    )


def first_given(state: State) -> State:
    """Nothing done yet. RefusedError where a file came without its first weights."""
    base = known_base(state, "undo")
    return State(base.sites, base.forms, base.aliases, state.ledger.until(0), state.given, base)


def without_coding(state: State, first: int, before: dict[str, str]) -> State:
    """The forms that stood before lossless edits; `before`: their digests. What a mask hid is zero now, for
    coding leaves it out: such a form decodes to the same bits and has another digest, which the ledger takes.
    """
    forms, ledger = dict(state.forms), state.ledger.until(first)
    for site, digest in before.items():
        plain = uncoded(forms[site])
        masked = any(node.mask for _, node in plain.walk())
        if digest not in (plain.digest, forms[site].digest) and not masked:
            raise RefusedError(
                f"undo: {site}: its form before held another coding; give the journal: journal=FOLDER"
            )
        forms[site] = forms[site] if forms[site].digest == digest else plain
        ledger = ledger.ending(site, forms[site].digest)
    return replace(state, forms=forms, ledger=ledger)


def rebuilt(state: State, first: int, journal: Journals) -> State:
    """The state after the ledger's first steps, from the journals of the runs from the model on."""
    begun, done = first_given(state), 0
    wanted, names = state.ledger.until(first), state.ledger.step_names()
    told = replace(wanted, entries=[entry for entry in wanted.entries if entry.name == START])
    for folder in [journal] if isinstance(journal, (str, Path)) else journal:
        lines = lines_of(folder)
        for line in lines:
            if done + line.step < first:
                group = line.group()
                begun, digests = apply(begun, group, "undo")
                told.record(done + line.step, names[done + line.step], group, digests)
        done += sum(line.seconds is not None for line in lines)
    if done < first:
        raise JournalError(
            f"undo: the journals hold {done} finished steps, and {first} are needed. Give those of all runs "
            f"from the model on, in order"
        )
    if told.digest != wanted.digest:
        raise JournalError("undo: this journal is of another run: what it tells is not what the ledger says")
    return replace(begun, ledger=wanted, attachments=state.attachments)


def replay(model: nn.Module | State, ledger: Ledger, journal: Journals) -> State:
    """Apply the groups of journals to the model that their first run began with, without computing them
    again."""
    given = model if isinstance(model, State) else start(model)
    if given.digest != ledger.base:
        raise RefusedError(f"replay: the ledger begins with model {ledger.base}, this one is {given.digest}")
    return rebuilt(replace(given, ledger=ledger), ledger.count, journal)


def compare_lock(recipe: Recipe, result: State) -> None:
    """Refuse a result that is not the one that the lock names."""
    for site, digest in recipe.result:
        found = result.forms[site].digest if site in result.forms else "no such site"
        if found != digest:
            raise RefusedError(
                f"lock: {site} came out as {found}, the lock says {digest}: not the same machine or data"
            )
