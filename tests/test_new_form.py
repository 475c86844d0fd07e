"""A new form needs its class, its trainable part and two lines in tables, and nothing else.

The forms of toy_forms.py are registered during a test. Every step must work before and after them, and files,
journals, undo, replay and measurements must support them.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from test_contract import on_disk, outcome, sound, step, there_and_back
from tiny import TRAINED, tiny
from toy_forms import Fixed, FixedPart, Rescale, Scaled, ScaledPart, fixed, scaled

from tersor.core.run import run
from tersor.core.state import State
from tersor.core.step import Needs
from tersor.core.view import View
from tersor.encode import coded, coded_like
from tersor.errors import FormatError
from tersor.forms import FORMS, Affine, Dense, Form, LowRank, Masked, Sum, uncoded
from tersor.io.container import load
from tersor.io.container_writer import save
from tersor.io.validate import structure
from tersor.measure.bits import bits_of
from tersor.measure.leaf_costs import leaf_costs_of
from tersor.model.sites import Site
from tersor.model.trainable_parts import PARTS, part
from tersor.record.events import Edit, Group, site_group
from tersor.steps import STEPS

W = torch.linspace(-1, 1, 20).reshape(4, 5)
NAMES = [name for name in STEPS if name != "export"]


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, trained in ((Scaled, ScaledPart), (Fixed, FixedPart)):
        monkeypatch.setitem(FORMS, kind.name, kind)
        monkeypatch.setitem(PARTS, kind, trained)


def kinds(result: State) -> set[str]:
    return {node.name for form in result.forms.values() for _, node in form.walk()}


@pytest.mark.sampled
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model", ["mixed", "attention"])
def test_every_step_takes_it(name: str, model: str, tmp_path: Path) -> None:
    given = tiny(model)
    result = outcome(given, [Rescale(), step(name, trained=name in TRAINED)], tmp_path)
    sound(result, given, tmp_path / "journal")
    there_and_back(result, given, tmp_path / "journal")
    on_disk(result, tmp_path)
    skipped = {entry.text for entry in result.ledger.entries if entry.step == 1 and entry.kind == "skipped"}
    assert not any(re.search("scaled|fixed", text, re.IGNORECASE) for text in skipped)
    if name != "factorize":  # factorize replaces the whole form by factors
        assert "scaled" in kinds(result)


@pytest.mark.parametrize("name", NAMES)
def test_it_comes_after_every_step(name: str, tmp_path: Path) -> None:
    given = tiny("mixed")
    result = outcome(given, [step(name, trained=name in TRAINED), Rescale()], tmp_path)
    sound(result, given, tmp_path / "journal")
    on_disk(result, tmp_path)
    assert {"scaled", "fixed"} <= kinds(result)


def test_masks_and_grids_go_where_the_weights_are() -> None:
    given = tiny("mixed")
    steps = [Rescale(), STEPS["prune"](keep=0.5), STEPS["quantize"](bits=4), STEPS["entropy"]()]
    result = run(given.model, steps, given.task)
    form = result.forms["back.weight"]
    assert isinstance(form, Scaled)
    assert isinstance(form.body, Masked)
    assert isinstance(form.body.body, Affine)
    assert form.axis == form.body.body.axis == 1
    assert run(given.model, steps[:2], given.task).forms["back.weight"].body.body.name == "fixed"


def test_it_is_trained_under_its_structure() -> None:
    form = Scaled(Masked(Dense(W > 0), scaled(W, 0)), Dense(torch.full((4, 1), 2.0)))
    here = part(form)
    assert torch.equal(here.value().detach(), form.decode())
    here.value().sum().backward()
    (leaf,) = here.parameters()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad != 0, W > 0)
    assert here.fold().digest == form.digest


TREES: dict[str, Form] = {
    "structure": scaled(W, 0),
    "under a mask": Masked(Dense(W > 0), scaled(W, 0)),
    "in a factor": LowRank(scaled(W[:, :2], 0), scaled(W[:2], 0)),
    "added": Sum(fixed(W, 4), Masked(coded(W > 0), Scaled(coded(W, W > 0), Dense(torch.ones(4, 1))))),
}


@pytest.mark.parametrize("name", TREES)
def test_it_is_cut_coded_measured_and_stored(name: str, tmp_path: Path) -> None:
    form, index = TREES[name], torch.tensor([2, 0, 2])
    for axis in (0, 1):
        torch.testing.assert_close(
            form.take(axis, index).decode(), form.decode().index_select(axis, index), rtol=1e-6, atol=1e-6
        )
    plain = uncoded(form)
    assert torch.equal(plain.decode(), form.decode())
    assert torch.equal(coded_like(plain, form).decode(), form.decode())
    assert bits_of(form).bound > 0
    assert [leaf.path for leaf in leaf_costs_of(form)] == [
        path for path, node in form.walk() if node.arrays()
    ]
    result = saved(form, tmp_path)
    assert result.forms["weight"].digest == form.digest
    assert torch.equal(result.forms["weight"].decode(), form.decode())


def saved(form: Form, folder: Path) -> State:
    with torch.random.fork_rng(devices=[]):
        model = torch.nn.Linear(5, 4, bias=False)
    Put.forms["weight"] = form
    save(run(model, Put()), folder / "toy.tersor")
    return load(folder / "toy.tersor")


@dataclass(frozen=True)
class Put:
    """Store a weight in a given form."""

    name: ClassVar[str] = "put"
    where: ClassVar[str] = "*"
    needs: ClassVar[Needs] = Needs.NOTHING
    forms: ClassVar[dict[str, Form]] = {}

    def run(self, view: View) -> Iterator[Group]:
        for site, form in self.forms.items():
            yield site_group(site, Edit(site, view.form(site), form, "absorb"))


@pytest.mark.parametrize(
    ("form", "said"),
    [
        (Scaled(Dense(W), Dense(torch.ones(3, 1))), r"weight: a factor of \[3, 1\]"),
        (Scaled(Fixed(Dense(W), 3), Dense(torch.ones(4, 1))), r"weight:body: codes of torch.float32"),
    ],
)
def test_its_own_rules_refuse_a_file(form: Form, said: str) -> None:
    with pytest.raises(FormatError, match=said):
        structure(form, Site("weight", (4, 5), "float32", "linear"))
