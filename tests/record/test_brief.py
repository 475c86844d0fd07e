"""Brief: a state and a ledger at a prompt and in a notebook: ten lines at most, and no name is raw."""

from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import tersor
from tersor.core.state import State
from tersor.errors import counted
from tersor.forms import Codebook, Dense, Masked
from tersor.model.sites import Site
from tersor.record.brief import outlined, printable
from tersor.record.ledger import Entry, Ledger


def state(forms: dict[str, object], steps: int = 2) -> State:
    sites = {
        name: Site(name, tuple(form.shape), "float32", "conv")  # type: ignore[attr-defined]
        for name, form in forms.items()
    }
    recipe = {"steps": [{"prune": {}}] * steps}
    return State(sites, forms, {}, Ledger("base", recipe))  # type: ignore[arg-type]


def test_a_state() -> None:
    found = state({"s": Dense(torch.tensor(1.0)), "w": Dense(torch.zeros(4, 5, 6))})
    assert repr(found).splitlines() == [
        f"State {found.digest}: 2 sites, 484 bytes, 2 steps; 1.0 x smaller than 484 bytes as given",
        "  w  4 x 5 x 6  480 bytes  Dense",
        "  s  scalar       4 bytes  Dense",
    ]


@pytest.mark.parametrize("count", [0, 1, 8, 9, 10, 30])
def test_ten_lines_at_most(count: int) -> None:
    found = state({f"w{n}": Dense(torch.zeros(n + 1)) for n in range(count)}, steps=count)
    for shown in (found, found.ledger):
        lines = repr(shown).splitlines()
        assert len(lines) <= 10
        assert len(lines) == 1 + min(count, 9)
    if count == 30:
        assert repr(found).splitlines()[1].startswith("  w29")
        assert repr(found).splitlines()[-1].split() == ["22", "others", "1,012", "bytes"]
        assert "22 others" in repr(found.ledger)


def test_a_ledger_has_a_line_for_each_step() -> None:
    net = nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 2))
    found = tersor.run(net, [tersor.Prune(where="0.weight"), tersor.Quantize(bits=4)]).ledger
    first, prune, quantize = repr(found).splitlines()
    assert first == f"Ledger {found.digest}: 2 steps, {len(found.entries)} entries"
    assert prune.split()[:4] == ["1", "prune", "1", "edit,"]
    assert quantize.split()[:4] == ["2", "quantize", "2", "edits,"]
    assert quantize.endswith(" s")
    past = Ledger("base", past=(("prune", "0"),), entries=[Entry(1, "x", "")])
    assert repr(past).splitlines()[1].split() == ["1", "prune", "past"]


class Page(HTMLParser):
    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.rows: list[list[str]] = []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1] in ("td", "th"):
            self.rows[-1].append(data)


HOSTILE = "<script>alert(1)</script>\x1b[31m\u202e\nx"


def test_a_notebook_shows_a_table() -> None:
    found = state({"w": Dense(torch.zeros(4, 5)), HOSTILE: Dense(torch.zeros(1))})
    page = Page(found._repr_html_())
    assert page.rows == [
        ["site", "shape", "bytes", "form"], ["w", "4 x 5", "80 bytes", "Dense"],
        [printable(HOSTILE), "1", "4 bytes", "Dense"],
    ]  # fmt: skip
    assert page.tags == {"div", "p", "table", "tr", "th", "td"}
    assert [row[1] for row in Page(found.ledger._repr_html_()).rows] == ["name", "prune", "prune"]


def test_names_are_printable_and_short() -> None:
    assert printable("a.weight") == "a.weight"
    assert printable("grüße") == "grüße"
    assert printable(HOSTILE) == "<script>alert(1)</script>\\x1b[31m\\u202e\\nx"
    found = printable("x" * 5000 + "end")
    assert len(found) <= 303
    assert found.endswith("end")
    assert len(repr(state({HOSTILE: Dense(torch.zeros(1))})).splitlines()) == 2


def test_forms_and_counts_in_words() -> None:
    codes = Dense(torch.zeros(2, 3, dtype=torch.uint8))
    book = Codebook(codes, Dense(torch.zeros(4)))
    assert outlined(Masked(Dense(torch.ones(2, 3, dtype=torch.bool)), book)) == "Masked(Codebook)"
    assert [counted(1, "entry"), counted(2, "entry"), counted(1000, "step"), counted(2, "branch")] == [
        "1 entry", "2 entries", "1,000 steps", "2 branches"
    ]  # fmt: skip
