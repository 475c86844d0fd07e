"""The ledger: its digest follows decisions and results, not measurements."""

import dataclasses

import pytest
import torch

from tersor.core.events import Edit, Group, Note
from tersor.core.ledger import Entry, Ledger
from tersor.forms import Dense, Masked

A, B = Dense(torch.zeros(2, 2)), Dense(torch.ones(2, 2))
GROUP: Group = (Edit("w", A, B, "refine"), Note("w", "done", "kept 4 of 4", {"kept": 4}))


def ledger(*groups: Group) -> Ledger:
    found = Ledger("base", {"seed": 0, "steps": [{"prune": {"keep": 0.5}}, {"measure": {}}]})
    for number, group in enumerate(groups or (GROUP,)):
        found.record(number, "prune", group)
    return found


def test_entries_follow_the_events() -> None:
    found = ledger()
    assert found.entries == [
        Entry(0, "prune", "w", how="refine", before=A.digest, after=B.digest),
        Entry(0, "prune", "w", kind="done", text="kept 4 of 4", data={"kept": 4}),
    ]
    assert list(found.edits()) == found.entries[:1]
    assert list(found.notes()) == list(found.notes("done")) == found.entries[1:]
    assert list(found.notes("skipped")) == []
    assert found.forms == {A.digest: A, B.digest: B}


def test_measured_numbers_and_words_do_not_change_the_digest() -> None:
    quiet = ledger((Edit("w", A, B, "refine"), Note("w", "done", "other words", {"kept": 3, "ms": 0.1})))
    assert quiet.digest == ledger().digest


CHANGES: dict[str, Ledger] = {
    "another result": ledger((Edit("w", A, Masked(A, B), "refine"), GROUP[1])),
    "another start": ledger((Edit("w", B, B, "refine"), GROUP[1])),
    "another relation": ledger((Edit("w", A, B, "absorb"), GROUP[1])),
    "another site": ledger((Edit("v", A, B, "refine"), GROUP[1])),
    "another kind of note": ledger((GROUP[0], Note("w", "skipped", "kept 4 of 4", {"kept": 4}))),
    "a note at another site": ledger((GROUP[0], Note("v", "done", "kept 4 of 4", {"kept": 4}))),
    "no note": ledger(GROUP[:1]),
    "another order": ledger(GROUP[::-1]),
    "a step later": ledger((), GROUP),
    "twice": ledger(GROUP, GROUP),
}


@pytest.mark.parametrize("what", CHANGES)
def test_decisions_change_the_digest(what: str) -> None:
    assert CHANGES[what].digest != ledger().digest


def test_base_recipe_and_step_name_change_the_digest() -> None:
    found = {ledger().digest}
    for field, value in (("base", "other"), ("recipe", {"seed": 1, "steps": []})):
        changed = dataclasses.replace(ledger(), **{field: value})
        found.add(changed.digest)
    renamed = Ledger("base", ledger().recipe)
    renamed.record(0, "slim", GROUP)
    assert len(found | {renamed.digest}) == 4


def test_the_digest_is_pinned() -> None:
    """Files carry ledgers: their digests must not change between versions."""
    assert ledger().digest == "a91ecf48230e41fb"
