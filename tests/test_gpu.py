"""On a GPU: training, cuts, timing and grids give the same results as on a CPU, and stay on the device."""

from pathlib import Path
from typing import Any

import pytest
import torch
from halving import CUTTABLE, Halving
from test_grids_in_state import Calibrate, answer, nets, task_of, three_edges
from tiny import TRAINED, Tiny, tiny

from tersor.core.history import undo
from tersor.core.run import run
from tersor.core.state import State
from tersor.io.container import load
from tersor.io.container_writer import save
from tersor.steps import (
    STEPS,
    Cluster,
    Entropy,
    Factorize,
    Fold,
    Measure,
    Prune,
    Quantize,
    Rdoq,
    Shorten,
    Slim,
)
from tersor.steps.own_training import folded, trainable

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


def devices(model: torch.nn.Module) -> set[str]:
    return {value.device.type for value in model.state_dict().values()}


def on_gpu(given: Tiny) -> Tiny:
    given.model.cuda()
    return Tiny(given.name, given.model, given.task, given.x.cuda())


@pytest.mark.parametrize("name", CUTTABLE)
def test_cuts_are_proved_on_the_gpu(name: str, tmp_path: Path) -> None:
    given = on_gpu(tiny(name, models=CUTTABLE))
    result = run(given.model, [Halving(name), Entropy(), Measure()], given.task)
    on_cpu = run(tiny(name, models=CUTTABLE).model, [Halving(name), Entropy(), Measure()], given.task)
    assert devices(result.model()) == {"cuda"}
    texts, wanted = ([e.text for e in r.ledger.notes("refused")] for r in (result, on_cpu))
    assert texts == wanted
    assert result.digest == on_cpu.digest
    save(result, tmp_path / "m.tersor")
    assert torch.equal(given.out(load(tmp_path / "m.tersor").model(given.model)), given.out(result.model()))
    assert undo(result).digest == result.ledger.base


@pytest.mark.parametrize("word", TRAINED)
@pytest.mark.parametrize("name", ["conv", "attention", "lstm"])
def test_steps_that_train_run_on_the_gpu(word: str, name: str) -> None:
    """They change the same tensors as on the CPU: some, unless slim or shorten find nothing that may go."""
    here, given = tiny(name), on_gpu(tiny(name))
    before = {key: value.clone() for key, value in given.model.state_dict().items()}
    steps = [STEPS[word](**TRAINED[word]), Entropy(), Measure()]
    on_cpu, result = (run(each.model, steps, each.task) for each in (here, given))
    assert devices(result.model()) == {"cuda"}
    assert given.out(result.model()).isfinite().all()
    assert {v.device.type for v in result.state_dict().values()} == {"cpu"}
    assert changed(result, before) == changed(on_cpu, before)
    assert changed(result, before) or word in {"slim", "shorten"}
    assert all(torch.equal(v, before[k]) for k, v in given.model.state_dict().items())


def changed(state: State, before: dict[str, torch.Tensor]) -> set[str]:
    now = state.state_dict()
    gone = before.keys() - now.keys()
    return gone | {n for n, value in before.items() if n in now and not torch.equal(value.cpu(), now[n])}


def test_a_users_loop_runs_on_the_gpu() -> None:
    """From there, and moved there."""
    found = []
    for given, module in (
        (there := on_gpu(tiny("conv")), trainable(run(there.model, Prune(keep=0.4)))),
        (there, trainable(run(tiny("conv").model, Prune(keep=0.4))).cuda()),
    ):
        torch.manual_seed(0)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            module(given.x).square().mean().backward()
            optimizer.step()
        found.append(folded(module))
        assert all(p.device.type == "cuda" for p in (*module.parameters(), *module.buffers()))
    assert torch.equal(found[0].state_dict()["head.weight"], found[1].state_dict()["head.weight"])
    assert found[0].digest != run(tiny("conv").model, Prune(keep=0.4)).digest


@pytest.mark.parametrize("name", ["conv", "attention", "lstm", "mixed"])
def test_slim_and_fold_on_the_gpu(name: str) -> None:
    """The same units go, whichever device ranks them by their weights."""
    steps = [Slim(keep=0.7, by="l2", unmet="nearest"), Fold()]
    here, there = tiny(name), on_gpu(tiny(name))
    on_cpu, result = run(here.model, steps, here.task), run(there.model, steps, there.task)
    assert result.kept == on_cpu.kept
    assert devices(result.model()) == {"cuda"}
    torch.testing.assert_close(
        there.out(result.model()).cpu(), here.out(on_cpu.model()), rtol=1e-2, atol=1e-3
    )


@pytest.mark.parametrize("name", ["resnet20", "gpt"])
def test_grids_are_simulated_on_the_gpu(name: str) -> None:
    model, args, kwargs = nets()[name]
    on_cpu = run(model, Calibrate(three_edges((model, args, kwargs))), task_of((model, args, kwargs)))
    call = (
        model.cuda(),
        tuple(value.cuda() for value in args),
        {key: value.cuda() for key, value in kwargs.items()},
    )
    result = run(call[0], Calibrate(three_edges(call)), task_of(call))
    assert set(result.grids) == set(on_cpu.grids)
    assert devices(result.model()) == {"cuda"}
    for edge, grid in result.grids.items():
        torch.testing.assert_close(grid.scale.decode(), on_cpu.grids[edge].scale.decode(), rtol=1e-2, atol=0)
    assert not torch.equal(answer(result.model(), call), answer(call[0], call))


AT_ONCE: dict[str, tuple[Any, ...]] = {
    "prune": (Prune(keep=0.4),),
    "int8": (Quantize(activations=8),),
    "int8, dynamic": (Quantize(activations=8, activation_range="dynamic"),),
    "few bits": (Quantize(bits=4, activations=8, rounding="gptq"),),
    "learned rounding": (Quantize(bits=3, rounding="adaround"),),
    "rounding of blocks": (Quantize(bits=3, rounding="brecq"),),
    "activation-aware": (Quantize(bits=4, per="group", group=4, awq=True),),
    "mixed": (Quantize(allowed="2,4,8", mean_bits=4),),
    "rdoq": (Rdoq(bits=3.0),),
    "shared values": (Cluster(entries=5),),
    "products": (Factorize(keep=0.5),),
    "layers": (Factorize(keep=0.5, layers=True),),
    "branches": (Shorten(keep=0.7, of="branches", unmet="nearest"),),
}


@pytest.mark.parametrize("recipe", AT_ONCE)
@pytest.mark.parametrize("name", ["conv", "attention"])
def test_steps_without_training_run_on_the_gpu(name: str, recipe: str, tmp_path: Path) -> None:
    """They change the same tensors as on the CPU, and the file computes what the model on the GPU does."""
    steps = [*AT_ONCE[recipe], Entropy(), Measure()]
    here, there = tiny(name), on_gpu(tiny(name))
    before = {key: value.clone() for key, value in there.model.state_dict().items()}
    on_cpu, result = (run(each.model, steps, each.task) for each in (here, there))
    assert devices(result.model()) == {"cuda"}
    assert {value.device.type for value in result.state_dict().values()} == {"cpu"}
    assert all(torch.equal(v, before[k]) for k, v in there.model.state_dict().items())
    edits, wanted = ({(e.site, e.step) for e in r.ledger.edits() if e.step == 0} for r in (result, on_cpu))
    assert edits == wanted
    want, found = here.out(on_cpu.model()), there.out(result.model()).cpu()
    assert (found - want).square().mean() <= 0.05 * want.square().mean()
    save(result, tmp_path / "m.tersor")
    again = load(tmp_path / "m.tersor").model(there.model)
    assert torch.equal(there.out(again), there.out(result.model()))
