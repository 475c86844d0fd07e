"""Integers coverage: int8 files of 78 architectures: what runs in integers, and whether the result is right.

python bench/integers_coverage.py [--record] [--seconds 900] [--side 0] [NAME ...]     a name of
                                                             bench/slim_zoo.py, a glob, a family
integers     share of the multiply-accumulates that ONNX Runtime computes in integers, by its own graph
parity       root mean square of file - simulation over that of simulation - float network
             an integer that is rounded the other way is seen by all later layers: below 1 the file differs
             less from the simulation than rounding itself does
             recurrent layers have integer kernels for ranges of each batch only
speed        times as fast as the float file: median of interleaved runs, one thread
Weights are untrained; batch norms are calibrated by some batches, or activations would grow or vanish. One
process a model, each with a limit of processor time. Outputs are those of the example.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from integers_kernels import Product, products
from slim_zoo import CASES, Case, with_norms
from sweep import answered, chosen, told
from table import Row
from torch import Tensor, nn

from tersor.core.run import run
from tersor.core.state import State
from tersor.errors import TersorError
from tersor.model.loader import TensorBatches
from tersor.model.outputs import tensors_of
from tersor.model.task import Task
from tersor.runtimes import onnxruntime
from tersor.steps import Export, Quantize

SECONDS = 900  # of processor time for one model
WHOLE: dict[str, Any] = {"products": "integer"}  # settings of quantize, and those of one family
HOW = {"recurrent": {"activation_range": "dynamic"}}
BATCH, BATCHES = 2, 2  # of the calibration
ROUNDS = 7  # of timing
MINUTE = 60.0
SHARE = {"transformers": 0.90}  # least share of integers, of the families that are not at MOST
MOST = 0.95
PARITY = 1.0


@dataclass(frozen=True)
class Outcome:
    """The result of one model."""

    name: str
    verdict: str = "done"  # or "refused", "wrong", "crashed", "missing"
    fixed: bool = False  # the file takes only the example's batch size
    integers: float = 0.0  # share of the multiply-accumulates
    layers: str = ""  # "20 of 21": weights that the step made integers
    parity: float = 0.0
    rounding: float = 0.0  # root mean square of simulation - float network, relative to the latter
    speed: float = 0.0  # times as fast as float; 0 if the float network cannot be exported
    quantize: float = 0.0  # seconds
    export: float = 0.0  # seconds
    seconds: float = 0.0  # of processor time, everything included
    left: str = ""  # the largest products in float
    said: str = ""


def fresh(case: Case, side: int) -> tuple[nn.Module, Tensor]:
    """A model with calibrated batch norms, and a batch of examples. `side`: of images, 0 for the case's."""
    torch.manual_seed(0)
    model = case.make().eval()
    example = torch.cat([case.example() for _ in range(BATCH * BATCHES)])
    if side and example.ndim == 4 and fits(model, example[..., :side, :side]):
        example = example[..., :side, :side].contiguous()
    with_norms(model, example)
    return model, example


def fits(model: nn.Module, example: Tensor) -> bool:
    """Whether the model runs on images of this size, in training too; some have it in their code."""
    model = copy.deepcopy(model)
    try:
        with torch.no_grad():
            for training in (False, True):
                model.train(training)(example[:2])
    except (RuntimeError, AssertionError, ValueError):
        return False
    return True


def examined(name: str, case: Case, side: int) -> Outcome:
    """Quantize and export one model in this process."""
    found = Outcome(name)
    try:
        model, example = fresh(case, side)
    except ImportError as error:
        return replace(found, verdict="missing", said=str(error))
    batches = TensorBatches(example, torch.zeros(len(example), dtype=torch.int64), batch=BATCH)
    task = Task("coverage", evaluate=batches, calibrate=batches, example=(example[:BATCH],))
    try:
        began = time.perf_counter()
        state = run(model, [Quantize(activations=8, **HOW.get(case.family, WHOLE))], task)
        found = replace(found, quantize=time.perf_counter() - began, **notes(state))
        with tempfile.TemporaryDirectory() as folder:
            return judged(found, state, model, task, Path(folder))
    except TersorError as error:
        return replace(found, verdict="refused", said=str(error))
    except Exception as error:  # a crash with one model is a finding, and the sweep goes on
        last = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"
        return replace(found, verdict="crashed", said=said)


def notes(state: State) -> dict[str, Any]:
    """What the step says itself."""
    *_, note = state.ledger.notes("integers")
    layers, left = note.data["layers"], note.data["float"]
    said = "; ".join(f"{name}: {why}" for name, why in list(left.items())[:3])
    no_grid = "; ".join(f"no grid {name}: {why}" for name, why in list(note.data["refused"].items())[:2])
    return {"layers": f"{layers} of {layers + len(left)}", "said": "; ".join(filter(None, (said, no_grid)))}


def exported(found: Outcome, state: nn.Module | State, task: Task, folder: Path, name: str) -> Outcome:
    """Write a file; with the example's batch size if it has to be."""
    began = time.perf_counter()
    try:
        run(state, [Export(path=name)], task, out=folder)
    except TersorError as error:
        run(state, [Export(path=name, dynamic_batch=False)], task, out=folder)
        found = replace(found, fixed=True, said=f"{found.said}; {error}")
    return replace(found, export=time.perf_counter() - began)


def judged(found: Outcome, state: State, model: nn.Module, task: Task, folder: Path) -> Outcome:
    """The file beside the simulation and beside the float network."""
    x = task.example[0]
    found = exported(found, state, task, folder, "int8.onnx")
    ours, given = outputs(state.model().eval(), x), outputs(model, x)
    integers = onnxruntime.open(folder / "int8.onnx")
    try:
        exported(found, model, task, folder, "float.onnx")
        found = replace(found, speed=speed(onnxruntime.open(folder / "float.onnx"), integers, x))
    except TersorError as error:  # the int8 file is judged without a time beside it
        found = replace(found, said=f"{found.said}; the float file: {error}")
    theirs = [item for item in integers.run(x) if item.dtype.kind == "f"]
    parts = products(folder / "int8.onnx", {integers.inputs[0]: x.numpy()})
    rounding, apart = rms(ours, given), rms(theirs, ours)
    share, left = shares(parts)
    parity = apart / max(rounding, 1e-12)
    found = replace(found, integers=share, left=left, rounding=rounding, parity=parity)
    return replace(found, verdict="wrong") if not found.parity <= PARITY else found


def shares(parts: list[Product]) -> tuple[float, str]:
    """(the share of integers, the largest products in float)."""
    whole = sum(part.macs for part in parts) or 1.0
    floats = sorted((part for part in parts if not part.integer), key=lambda part: -part.macs)
    text = ", ".join(f"{part.op} {part.name} {part.macs / whole:.1%}" for part in floats[:4])
    rest = f" and {len(floats) - 4} more" if len(floats) > 4 else ""
    return 1 - sum(part.macs for part in floats) / whole, text + rest


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor) -> list[np.ndarray]:
    return [item.numpy() for item in tensors_of(copy.deepcopy(model)(x)) if item.is_floating_point()]


def rms(found: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    """Root mean square of the difference over that of `wanted`."""
    apart = sum(float(np.square(a.astype(float) - b).sum()) for a, b in zip(found, wanted, strict=True))
    power = sum(float(np.square(b.astype(float)).sum()) for b in wanted)
    return (apart / power) ** 0.5 if power else float(apart > 0)


def speed(floats: Any, integers: Any, x: Tensor) -> float:
    """The median ratio of the float file's time to the other's."""
    ratios = []
    for _ in range(ROUNDS + 1):
        times = []
        for session in (floats, integers):
            began = time.perf_counter()
            session.run(x)
            times.append(time.perf_counter() - began)
        ratios.append(times[0] / times[1])
    return float(np.median(ratios[1:]))  # the first fills caches


# All models


def least(one: Outcome) -> float:
    return SHARE.get(CASES[one.name].family, MOST)


def line(found: Outcome) -> str:
    words = f"{found.verdict:8}{'fixed' if found.fixed else '':6}{found.integers:7.1%} {found.layers:>10}"
    close = f"parity {found.parity:5.2f} rounding {found.rounding:7.1e} speed {found.speed:4.2f}"
    times = f"quantize {found.quantize:5.1f} export {found.export:5.1f} s"
    return f"{found.name:44} {words} {close}  {times}  {found.left} | {found.said}".rstrip(" |")


def rows(found: list[Outcome]) -> Iterator[Row]:
    """The targets, if every model was tried."""
    if len(found) < len(CASES) or any(one.verdict == "missing" for one in found):
        return
    bench, of = "integers_coverage", f"of {len(found)}"
    done = [one for one in found if one.verdict == "done"]
    rest = ", ".join(f"{one.name} {one.verdict}" for one in found if one.verdict != "done")
    yield Row(bench, "all", "int8 files that run as simulated", len(done), of, f">= {len(found)}", note=rest)
    full = [one for one in done if one.integers >= least(one)]
    rest = ", ".join(f"{one.name} {one.integers:.0%}" for one in done if one.integers < least(one))
    what = f"of them {MOST:.0%} in integers (transformers {SHARE['transformers']:.0%})"
    yield Row(bench, "all", what, len(full), of, f">= {len(found)}", note=rest)
    late = [one for one in found if one.quantize > MINUTE]
    note = ", ".join(f"{one.name} {one.quantize:.0f} s" for one in late)
    yield Row(bench, "all", "quantize takes more than a minute", len(late), of, note=note)
    speeds = sorted((one.speed, one.name) for one in done if one.speed)
    if speeds:
        middle, note = speeds[len(speeds) // 2][0], f"least {speeds[0][0]:.2f}, {speeds[0][1]}"
        yield Row(bench, "all", "times as fast as float, median", round(middle, 2), note=note)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="a model, a glob or a family; default: all")
    parser.add_argument("--record", action="store_true", help="put the numbers into bench/results.csv")
    parser.add_argument("--here", action="store_true", help="one model, in this process, as a line of JSON")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="processor time that a model may take")
    parser.add_argument(
        "--side", type=int, default=0, help="of images, in pixels; default: the published one"
    )
    options = parser.parse_args(argv)
    try:
        names = chosen(options.names, CASES)
    except KeyError as error:
        parser.error(f"no model {error}; there are {', '.join(CASES)}")
    if options.here:
        torch.set_num_threads(1)
        resource.setrlimit(resource.RLIMIT_CPU, (options.seconds, options.seconds + 10))
        for name in names:
            one = replace(examined(name, CASES[name], options.side), seconds=time.process_time())
            print(json.dumps(asdict(one)))
        return 0
    found = []
    for name in names:  # one at a time: they are timed
        found.append(Outcome(**answered(__file__, name, options.seconds, f"--side={options.side}")))
        print(line(found[-1]), flush=True)
    told(list(rows(found)), options.record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
