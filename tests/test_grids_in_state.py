"""Grids on edges as part of a state: found by a toy step on three edges, saved, undone, resumed, made stale
by what changes weights, then refused, trained by a plain loop through the module's own signature."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import onnx
import pytest
import torch
from nets import Call, benched, floats, nets
from torch import nn

from tersor.core.history import undo
from tersor.core.run import run
from tersor.core.state import State
from tersor.core.step import Needs
from tersor.core.view import View
from tersor.errors import RefusedError
from tersor.io.container import load
from tersor.io.container_writer import save
from tersor.io.verify import verify
from tersor.model.edges import edges_of
from tersor.model.observe import observed
from tersor.model.simulate import gridded
from tersor.model.task import Task
from tersor.model.trainable_forms import TrainableForms
from tersor.record.events import Cut, Edit, Group, Note
from tersor.steps import STEPS, Entropy, Export, Prune


@dataclass(frozen=True)
class Calibrate:
    """Put grids on three edges, with ranges from calibration batches."""

    name: ClassVar[str] = "calibrate"
    edges: tuple[str, ...]
    where: ClassVar[str] = "*"
    needs: ClassVar[Needs] = Needs.MODEL | Needs.TASK

    def run(self, view: View) -> Iterator[Group]:
        found = observed(view.plain(), view.task, self.edges)
        for edge, grid in found.items():
            old = view.state.grids.get(edge)
            yield Group(edge, [Edit(edge, old, grid, "wrap"), Note(edge, "done", f"{grid.bits} bits")])


def task_of(call: Call) -> Task:
    _, args, kwargs = call

    def feed(model: nn.Module, batch: Any) -> torch.Tensor:
        return floats(model(*args, **kwargs))[0].flatten(1)[:, :5]

    target = torch.zeros(len(floats(feed(call[0], None))[0]), dtype=torch.int64)
    batches = [(torch.zeros(1), target)] * 2
    return Task(evaluate=batches, calibrate=batches, train=batches, feed=feed)


NETS = {"resnet20": lambda: nets()["resnet20"], "gpt": lambda: nets()["gpt"]}
BENCHED = {name: (lambda name=name: benched(name)) for name in ("resnet20", "tinygpt")}


def three_edges(call: Call) -> tuple[str, ...]:
    """An addition, a product or convolution, and one near the end."""
    model, args, kwargs = call
    names = [name for name in edges_of(model, *args, **kwargs) if not name.startswith("/input")]
    add = next(name for name in names if "/add" in name)
    dot = next(name for name in names if name.rpartition("/")[2].split(":")[0] in ("conv2d", "linear"))
    return tuple(dict.fromkeys((dot, add, names[-2])))


@pytest.fixture(params=[*NETS, *(f"benched {name}" for name in BENCHED)])
def given(request: pytest.FixtureRequest) -> Call:
    word, _, name = request.param.rpartition(" ")
    return (BENCHED if word else NETS)[name]()


def answer(model: nn.Module, call: Call) -> torch.Tensor:
    with torch.no_grad():
        return floats(model.eval()(*call[1], **call[2]))[0]


@pytest.mark.sampled(given=("resnet20", "gpt"))
def test_they_are_saved_undone_and_made_stale(given: Call, tmp_path: Path) -> None:
    model, task, edges = given[0], task_of(given), three_edges(given)
    assert len(edges) == 3
    result = run(model, [Calibrate(edges)], task, journal=tmp_path / "journal")
    assert set(result.grids) == set(edges)
    assert not any(grid.stale for grid in result.grids.values())
    simulated = answer(result.model(), given)
    assert torch.equal(simulated, answer(gridded(model, result.grids), given))
    assert not torch.equal(simulated, answer(model, given))

    save(result, tmp_path / "m.tersor")
    loaded = load(tmp_path / "m.tersor")
    assert loaded.digest == result.digest != result.ledger.base
    assert loaded.ledger.digest == result.ledger.digest
    assert torch.equal(answer(loaded.model(model), given), simulated)
    checks = verify(tmp_path / "m.tersor")
    assert all(check.sound for check in checks)
    assert [check.site for check in checks] == ["", *result.sites, *result.grids]

    assert undo(result).digest == result.ledger.base
    two = run(result, Prune(keep=0.9, where=next(s.name for s in result.sites.values() if s.is_weight)), task)
    assert all(grid.stale for grid in two.grids.values())
    with pytest.raises(RefusedError, match="its grid is stale, and 2 more.*Calibrate again"):
        two.model()
    with pytest.raises(RefusedError, match="stale"):
        run(two, STEPS["measure"](), task)
    fresh = run(two, Calibrate(edges), task)
    assert not any(grid.stale for grid in fresh.grids.values())
    fresh.model()
    assert undo(loaded.on(model)).digest == result.ledger.base


def test_an_interrupted_run_resumes_between_two_grids(given: Call, tmp_path: Path) -> None:
    model, task, step = given[0], task_of(given), Calibrate(three_edges(given))
    whole = run(model, step, task, journal=tmp_path / "whole")
    (tmp_path / "cut").mkdir()
    for name in ("head.json", "000001.group"):
        shutil.copy(tmp_path / "whole" / name, tmp_path / "cut")
    again = run(model, step, task, journal=tmp_path / "cut", resume=True)
    assert again.digest == whole.digest
    assert again.ledger.digest == whole.ledger.digest
    assert undo(whole, 1, journal=tmp_path / "whole").grids == {}


def test_a_cut_makes_them_stale_and_lossless_coding_does_not() -> None:
    call = nets()["resnet20"]
    result = run(call[0], [Calibrate(three_edges(call)), Entropy()], task_of(call))
    assert not any(grid.stale for grid in result.grids.values())

    @dataclass(frozen=True)
    class CutLast:
        name: ClassVar[str] = "cut"
        where: ClassVar[str] = "*"
        needs: ClassVar[Needs] = Needs.MODEL

        def run(self, view: View) -> Iterator[Group]:
            block = "layer1.0"
            norm = [f"{block}.bn1.{key}" for key in ("weight", "bias", "running_mean", "running_var")]
            cuts = [Cut(name, 0, (0, 1, 2)) for name in (f"{block}.conv1.weight", *norm)]
            yield Group("inner", [*cuts, Cut(f"{block}.conv2.weight", 1, (0, 1, 2), reads=True)])

    after = run(result, CutLast(), task_of(call))
    assert after.shape("layer1.0.conv1.weight")[0] == 3
    assert [entry.kind for entry in after.ledger.notes(first=-1)] == ["proved"]
    assert all(grid.stale for grid in after.grids.values())


@pytest.mark.sampled(given=("resnet20", "gpt"))
def test_trained_by_a_plain_loop_through_the_modules_own_signature(given: Call) -> None:
    """Twenty steps towards the model's outputs without grids: the scales learn, and are stored as grids."""
    model, args, kwargs = given
    state = run(model, Calibrate(three_edges(given)), task_of(given))
    wanted = answer(model, given)
    coarse = {
        edge: grid.replace(scale=type(grid.scale)(grid.scale.decode() * 3))
        for edge, grid in state.grids.items()
    }
    tuned = TrainableForms(
        state.plain(),
        state.forms,
        state.sites,
        [],
        edge_grids=coarse,
        example=lambda net: net(*args, **kwargs),
    )
    # A scale moves by a fraction of its own value, unlike Adam's steps.
    groups = [{"params": [p], "lr": 0.02 * float(p.detach().mean())} for p in tuned.grids.parameters()]
    optimizer = torch.optim.Adam(groups)
    losses = []
    for _ in range(20):
        loss = (floats(tuned.eval()(*args, **kwargs))[0] - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert min(losses[-5:]) < losses[0]
    folded = tuned.fold_grids()
    assert {grid.digest for grid in folded.values()}.isdisjoint(grid.digest for grid in coarse.values())
    learned = State(**{**vars(state), "grids": folded})
    tuned.requires_grad_(False)
    assert torch.equal(answer(learned.model(), given), answer(tuned, given))


def test_exported_edges_are_rounded_in_the_file_too(tmp_path: Path) -> None:
    """Also where the weights are floats."""
    call = nets()["resnet20"]
    model, args, kwargs = call
    on = replace(task_of(call), example=args)
    result = run(run(model, Calibrate(three_edges(call)), on), Export(dynamic_batch=False), on, out=tmp_path)
    (note,) = result.ledger.notes("written")
    kinds = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert kinds.count("QuantizeLinear") == 3
    rounded, exact = (floats(net(*args, **kwargs))[0] for net in (result.model(), model))
    assert note.data["max_abs"] < 0.5 * float((rounded - exact).abs().max())
