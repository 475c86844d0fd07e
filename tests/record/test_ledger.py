"""Ledger: its digest depends on decisions and results, not on measurements."""

import dataclasses

import pytest
import torch

from tersor.forms import Dense, Masked
from tersor.model.changes import Replace, Set
from tersor.record.events import Cut, Edit, Group, Note, site_group
from tersor.record.ledger import Entry, Ledger

A, B = Dense(torch.zeros(2, 2)), Dense(torch.ones(2, 2))
EDIT, NOTE = Edit("w", A, B, "refine"), Note("w", "done", "kept 4 of 4", {"kept": 4})
GROUP = site_group("w", EDIT, NOTE)


def ledger(*groups: Group) -> Ledger:
    found = Ledger("base", {"seed": 0, "steps": [{"prune": {"keep": 0.5}}, {"measure": {}}]})
    for number, group in enumerate(groups or (GROUP,)):
        digests = [
            (e.before.digest, e.after.digest) if isinstance(e, Edit) else ("", "") for e in group.events
        ]
        found.record(number, "prune", group, digests)
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


def test_measured_numbers_and_words_do_not_change_the_digest() -> None:
    quiet = ledger(
        site_group("w", Edit("w", A, B, "refine"), Note("w", "done", "other words", {"kept": 3, "ms": 0.1}))
    )
    assert quiet.digest == ledger().digest


CHANGES: dict[str, Ledger] = {
    "another result": ledger(site_group("w", Edit("w", A, Masked(A, B), "refine"), NOTE)),
    "another start": ledger(site_group("w", Edit("w", B, B, "refine"), NOTE)),
    "another relation": ledger(site_group("w", Edit("w", A, B, "absorb"), NOTE)),
    "another site": ledger(site_group("w", Edit("v", A, B, "refine"), NOTE)),
    "another kind of note": ledger(site_group("w", EDIT, Note("w", "skipped", "kept 4 of 4", {"kept": 4}))),
    "a note at another site": ledger(site_group("w", EDIT, Note("v", "done", "kept 4 of 4", {"kept": 4}))),
    "no note": ledger(site_group("w", EDIT)),
    "another order": ledger(site_group("w", NOTE, EDIT)),
    "a step later": ledger(site_group("w"), GROUP),
    "twice": ledger(GROUP, GROUP),
}


@pytest.mark.parametrize("what", CHANGES)
def test_decisions_change_the_digest(what: str) -> None:
    assert CHANGES[what].digest != ledger().digest


STRUCTURE: list[tuple[Cut | Set | Replace, tuple[str, str]]] = [
    (Cut("w", 0, (0, 1)), ("a", "b")),
    (Cut("w", 1, (0, 1)), ("a", "b")),
    (Cut("w", 0, (0, 1)), ("a", "c")),
    (Cut("v", 0, (0, 1)), ("a", "b")),
    (Set("layer", "groups", 2), ("", "")),
    (Set("layer", "groups", 4), ("", "")),
    (Set("layer", "heads", 2), ("", "")),
    (Set("other", "groups", 2), ("", "")),
    (Replace("layer", "identity"), ("", "")),
    (Replace("layer", "bias"), ("", "")),
    (Replace("layer", "product", {"layers": 2}), ("", "")),
    (Replace("layer", "product", {"layers": 3}), ("", "")),
]


def test_every_change_of_structure_changes_the_digest() -> None:
    found = set()
    for event, digests in STRUCTURE:
        one = Ledger("base", {"seed": 0, "steps": [{"slim": {}}]})
        one.record(0, "slim", Group("all", (event,)), [digests])
        assert one.entries[0].changes
        assert not list(one.edits()) + list(one.notes())
        found.add(one.digest)
    assert len(found) == len(STRUCTURE)


def test_seeds_of_chained_recipes_stay_with_their_steps() -> None:
    first = Ledger("base").follow({"seed": 4, "steps": [{"prune": {}}, {"prune": {}}]})
    joined = first.follow({"seed": 9, "steps": [{"prune": {}}]})
    assert joined.recipe["seed"] == [4, 4, 9]
    assert len(joined.recipe["steps"]) == joined.count == 3
    assert joined.until(2).recipe == first.recipe
    assert first.count == 2


def test_base_recipe_and_step_name_change_the_digest() -> None:
    found = {ledger().digest}
    for field, value in (("base", "other"), ("recipe", {**ledger().recipe, "seed": 1})):
        changed = dataclasses.replace(ledger(), **{field: value})
        found.add(changed.digest)
    renamed = Ledger("base", ledger().recipe)
    renamed.record(0, "slim", GROUP, [(A.digest, B.digest), ("", "")])
    assert len(found | {renamed.digest}) == 4


def test_the_digest_is_pinned() -> None:
    """Files hold ledgers, so their digests must not change between versions."""
    assert ledger().digest == "f2b4f1c9b0092a9f"


# --- old steps shortened to a line each ---


def test_steps_shortened_to_a_line_do_not_change_the_digest() -> None:
    whole = ledger(GROUP, GROUP)
    for count in range(3):
        brief = whole.brief(count)
        assert brief.digest == whole.digest
        assert [name for name, _ in brief.past] == ["prune", "measure"][:count]
        assert brief.entries == [entry for entry in whole.entries if entry.step >= count]
        assert brief.step_names() == whole.step_names()
        assert brief.count == whole.count
        assert brief.brief(2) == whole.brief(2)


def test_a_changed_line_changes_the_digest() -> None:
    one, other = ledger(GROUP, GROUP).brief(1), ledger(site_group("w", EDIT), GROUP).brief(1)
    assert one.entries == other.entries
    assert one.digest != other.digest


def test_timed_notes_are_not_in_the_digest() -> None:
    timed = ledger(site_group("w", EDIT, NOTE, Note("", "latency", "0.1 ms", {"ms": 0.1}, timed=True)))
    assert timed.digest == ledger().digest
    assert timed.brief(0).entries == ledger().entries
