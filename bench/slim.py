"""Slim: channels removed by Tersor and by Torch-Pruning: accuracy at equal MACs and equal time of tuning.

python bench/slim.py [--peers PYTHON] [--quick] [--seconds 80] [--out FOLDER] [--at-once 2] [--untimed]
                    [--record] [SUBJECT ...]
PYTHON is an interpreter with the peers (bench/slim_peer.py), by default TERSOR_SLIM_PEERS or this one.
ours     redundancy, refitted without labels; tuned with labels and the unpruned network as the teacher
peers    Torch-Pruning's magnitude and Taylor; tuned with labels
Each run is a process with one thread, and two run at a time; FOLDER keeps their results, and those that are
there are not run again. All tune for the same seconds of processor time, the teacher's passes included;
optimizer, schedule, batches, precision and flips are the same. The peer prunes first, to about 2 and 4 times
fewer MACs; ours is asked for the same number. gain = our accuracy - the peer's, in points, on the same test
images: the mean of the seeds for each image, then a paired interval over images.
At last the networks of seed 0 are timed side by side in ONNX Runtime and OpenVINO (bench/slim_latency.py).
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import job
import numpy as np
import torch
from child import replies
from networks import load, task
from slim_peer import (
    BATCH,
    DECAY,
    Outcome,
    answers,
    ended,
    export,
    options_of,
    percent,
)
from table import Row
from torch import Tensor, nn

from tersor.core.run import run
from tersor.core.state import State
from tersor.maths.statistics import paired
from tersor.model.loader import TensorBatches
from tersor.model.task import Task
from tersor.steps import Finetune

HERE = Path(__file__).resolve().parent
# Processor time of one tuning, about one epoch of the network at half its MACs.
SECONDS = {"resnet20": 80.0, "vgg": 60.0}
QUICK_SECONDS = 10.0
FACTORS, SEEDS, MULTIPLES = (2, 4), (0, 1, 2), (8, 16)
OURS, BASIS = "slim", "magnitude"  # BASIS: the peer whose MACs ours is asked for, and whose file is timed
FAST = "slim by latency"  # ours, asked for half the measured time of ONNX Runtime, in the place of 2x
SLOW = ("taylor", "kirigami")  # pruned once a point, not tuned
CALIBRATE, FAST_BATCH = 512, 64  # images without labels; a batch that is timed
AT_ONCE, LIMIT = 2, 1800  # processes; seconds of one
RUNS = "runs"  # folder of their results
BEFORE = {2: ">= 75"}  # accuracy of ours before any tuning
PROBES = (10, 40)  # steps: the second less the first gives the time of a step
TUNING: dict[str, Any] = {
    "lr": 0.02,
    "optimizer": "sgd",
    "schedule": "onecycle",
    "weight_decay": DECAY,
    "teacher_weight": 0.9,
    "bf16": True,
    "channels_last": True,
}


class Point(NamedTuple):
    """What a network is pruned to."""

    factor: int  # times fewer MACs
    multiple: int = 1  # channels of each layer are a multiple of it

    def __str__(self) -> str:
        return f"{self.factor}x" + (f", multiples of {self.multiple}" if self.multiple > 1 else "")


# Our side, in its own process


def slimmed(
    net: nn.Module, on: Task, factor: float, *, multiple: int = 1, seed: int = 0, fast: bool = False
) -> State:
    """The network with that many times fewer MACs, or that much faster. All settings of slim are here."""
    from tersor.steps import Slim

    # On a busy machine the time that was reached may not be confirmed, and that must not end the other runs:
    # slim_latency.py times the result again, beside theirs.
    fastest = {"of": "latency", "batch": FAST_BATCH, "unmet": "nearest"}
    budget: dict[str, Any] = fastest if fast else {"of": "macs"}
    return run(net, [Slim(keep=1 / factor, multiple=multiple, **budget)], on, seed=seed)


def own(options: argparse.Namespace) -> Outcome:
    """One run of ours: pruned, scored, and tuned from there."""
    given, on = load(options.subject), flipping(task(batch=BATCH, calibrate=CALIBRATE))
    found, state = tuned(given, on, options)
    return ended(found, given, state.model(), on, options)


def tuned(given: nn.Module, on: Task, options: argparse.Namespace) -> tuple[Outcome, State]:
    """The pruned network, tuned if there are seconds for it."""
    began, fast = time.process_time(), options.method == FAST
    state = slimmed(given, on, options.factor, multiple=options.multiple, seed=options.seed, fast=fast)
    pruning = time.process_time() - began
    found = Outcome(options.subject, options.method, options.factor, options.seed, pruning=pruning)
    found = replace(found, before=percent(answers(state.model(), on)))
    if options.seconds:
        epochs, began = affordable(state, on, options.seconds), time.process_time()
        state = run(state, [Finetune(epochs=epochs, **TUNING)], on, seed=options.seed)
        found = replace(found, tuning=time.process_time() - began, epochs=epochs)
    return found, state


def flipping(on: Task) -> Task:
    """The task with full training batches, half of whose images are flipped."""
    train = TensorBatches(*on.train.dataset.tensors, batch=BATCH, shuffle=True, drop_last=True)
    train.collate_fn = flipped
    return replace(on, train=train)


def flipped(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    images, labels = batch
    which = torch.rand(len(images)) < 0.5
    return torch.where(which[:, None, None, None], images.flip(3), images), labels


def affordable(pruned: State, on: Task, seconds: float) -> float:
    """The epochs that take so many seconds of processor time, from two short trainings."""
    steps = len(on.train)
    took = []
    for count in PROBES:
        began = time.process_time()
        run(pruned, [Finetune(epochs=count / steps, **TUNING)], on)
        took.append(time.process_time() - began)
    step = (took[1] - took[0]) / (PROBES[1] - PROBES[0])
    begin = max(0.0, took[0] - PROBES[0] * step)  # of any training: the teacher, the optimizer, the check
    return max(1.0, (seconds - begin) / step) / steps


# All runs of a subject


def command(python: str, subject: str, factor: float, method: str, *, multiple: int = 1, seed: int = 0,
            seconds: float = 0.0, out: Path | None = None) -> list[str]:  # fmt: skip
    mine = method in (OURS, FAST)
    script = ["slim.py", "--one"] if mine else ["slim_peer.py"]
    words = [sys.executable if mine else python, str(HERE / script[0]), *script[1:]]
    words += [subject, f"{factor}", method, "--multiple", f"{multiple}", "--seed", f"{seed}"]
    return [*words, "--seconds", f"{seconds}", *(["--out", str(out)] if out else [])]


def outcome(words: list[str], kept: Path) -> Outcome | None:
    """The result of one run, from the file `kept` if it is there. None if its library is not installed."""
    if kept.exists():
        return Outcome(**json.loads(kept.read_text()))
    if not (found := replies(words, LIMIT)):
        return None
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(found[-1]))
    return Outcome(**found[-1])


class Runs(NamedTuple):
    """What was asked of one run."""

    point: Point
    method: str
    seed: int

    def __str__(self) -> str:
        return f"{self.point.factor}x-{self.point.multiple}-{self.method}-{self.seed}".replace(" ", "-")


def all_runs(
    subject: str, options: argparse.Namespace, seconds: float, out: Path, factors: dict[Point, float]
) -> dict[Runs, Outcome]:
    """Every run of a subject, two at a time; the peers' follow ours of their point and seed.

    `factors`: each point, and the peer's real number of MACs, which ours is asked for.
    """
    seeds = SEEDS[:1] if options.quick else SEEDS
    asked = [] if options.untimed else [[Runs(Point(FACTORS[0]), FAST, 0)]]
    asked += [
        [Runs(point, method, seed) for method in (OURS, BASIS)]
        for point in factors
        for seed in (seeds if point.multiple == 1 else (0,))
    ]
    if not options.quick:
        asked += [[Runs(point, slow, 0)] for point in factors for slow in SLOW if point.multiple == 1]

    def one(ask: Runs, given: float) -> Outcome | None:
        factor = factors[ask.point] if ask.method == OURS else ask.point.factor
        files = out / f"{ask.point.factor}-{ask.method}".replace(" ", "-") if given else None
        words = command(
            options.peers, subject, factor, ask.method, multiple=ask.point.multiple, seed=ask.seed,
            seconds=given, out=files,
        )  # fmt: skip
        return outcome(words, out / RUNS / f"{ask}{f'-{seconds:g}' if given else ''}.json")

    def together(asks: list[Runs]) -> list[tuple[Runs, Outcome]]:
        """Ours trains for steps that are foreseen to take `seconds`; the peer, by the clock, for as long."""
        found, given = [], seconds
        for ask in asks:
            if reply := one(ask, 0.0 if ask.method in SLOW else given):
                found.append((ask, reply))
                given = reply.tuning if ask.method == OURS else given
        return found

    with ThreadPoolExecutor(options.at_once) as pool:
        return dict(item for found in pool.map(together, asked) for item in found)


def measure(subject: str, options: argparse.Namespace) -> Iterator[Row]:
    seconds = options.seconds or (QUICK_SECONDS if options.quick else SECONDS[subject])
    points = [Point(factor) for factor in FACTORS]
    points += [] if options.quick else [Point(FACTORS[0], multiple) for multiple in MULTIPLES]
    with tempfile.TemporaryDirectory() as folder:
        out = (options.out or Path(folder)) / subject
        factors = reached(subject, points, options, out)
        runs = all_runs(subject, options, seconds, out, factors)
        for point in points:
            mine = {ask: found for ask, found in runs.items() if ask.point == point}
            yield from accuracy_rows(subject, point, mine)
        if not options.untimed:
            yield from latency_rows(subject, options.peers, runs, out)


def reached(subject: str, points: list[Point], options: argparse.Namespace, out: Path) -> dict[Point, float]:
    """The MACs that the peer reaches at each point: its steps are whole channels of every layer."""

    def one(point: Point) -> float:
        words = command(options.peers, subject, point.factor, BASIS, multiple=point.multiple)
        found = outcome(words, out / RUNS / f"{Runs(point, BASIS, 0)}.json")
        return found.macs if found else float(point.factor)

    with ThreadPoolExecutor(options.at_once) as pool:
        return dict(zip(points, pool.map(one, points), strict=True))


# Rows


def accuracy_rows(subject: str, point: Point, runs: dict[Runs, Outcome]) -> Iterator[Row]:
    """Accuracy before and after tuning, and the gain over each peer."""
    by_method: dict[str, list[Outcome]] = {}
    for ask, found in runs.items():
        by_method.setdefault(ask.method, []).append(found)
    for method, found in by_method.items():
        first = found[0]
        target = BEFORE.get(point.factor, "") if method == OURS and point.multiple == 1 else ""
        note = f"{first.pruning:.0f} s; channels {first.widths}"
        yield row(subject, f"{point}, {method}, before tuning", first.before, "%", target, note=note)
        if first.tuning:
            mean = float(np.mean([one.after for one in found]))
            note = f"{first.macs:g} x fewer MACs, {first.parameters:g} x fewer parameters; "
            note += f"{spread(found, 'tuning')} s, {spread(found, 'epochs')} epochs; "
            note += "seeds " + ", ".join(f"{one.after:.2f}" for one in found)
            yield row(subject, f"{point}, {method}, accuracy", round(mean, 2), "%", note=note)
    if OURS not in by_method or BASIS not in by_method or point.multiple > 1:
        return
    ours, theirs = by_method[OURS], by_method[BASIS]
    mean, low, high = gain([scores(one) for one in ours], [scores(one) for one in theirs])
    each = ", ".join(f"{a.after - b.after:+.2f}" for a, b in zip(ours, theirs, strict=True))
    note = f"mean {mean:+.2f}, 95 % interval {low:+.2f} to {high:+.2f}; seeds {each}"
    what = f"{point}, gain over {BASIS}, at least"
    yield row(subject, what, round(low, 3), "points", ">= 0.001", note=note)
    more = 100 * (theirs[0].macs / ours[0].macs - 1)
    yield row(subject, f"{point}, MACs over {BASIS}'s", round(more, 2), "%", "<= 1")
    longer = 100 * (sum(o.tuning for o in ours) / sum(t.tuning for t in theirs) - 1)
    yield row(subject, f"{point}, time of tuning over {BASIS}'s", round(longer, 2), "%", "<= 2")


def spread(found: list[Outcome], word: str) -> str:
    values = [getattr(one, word) for one in found]
    low, high = min(values), max(values)
    return f"{low:.3g}" if f"{low:.3g}" == f"{high:.3g}" else f"{low:.3g} to {high:.3g}"


def scores(found: Outcome) -> np.ndarray:
    return np.load(found.answers).astype(np.float64)  # [N], 0 or 1


def gain(ours: list[np.ndarray], theirs: list[np.ndarray]) -> tuple[float, float, float]:
    """Our accuracy less theirs in points, and its 95 % interval, from 0 or 1 for each seed and image.

    The seeds share their images, so they are no independent samples: the mean of the seeds is taken for each
    image, and the interval is over images (Student's t). What other seeds would give is not in it.
    """
    mine, other = (np.mean(np.stack(seeds), axis=0) for seeds in (ours, theirs))  # [N]
    mean, low, high, _ = paired(other, mine)
    return 100 * mean, 100 * low, 100 * high


def latency_rows(subject: str, python: str, runs: dict[Runs, Outcome], out: Path) -> Iterator[Row]:
    """Times of the networks of seed 0, with their accuracy. None if the interpreter has no runtime."""
    chosen = {
        ask: found
        for ask, found in runs.items()
        if ask.seed == 0 and found.onnx and ask.method in (OURS, FAST, BASIS)
    }
    files = {"unpruned": out / f"{subject}.onnx"}
    files |= {f"{ask.point}, {ask.method}": Path(found.onnx) for ask, found in chosen.items()}
    accuracy = {f"{ask.point}, {ask.method}": found.after for ask, found in chosen.items()}
    out.mkdir(parents=True, exist_ok=True)
    export(copy.deepcopy(load(subject)), files["unpruned"])
    words = [python, str(HERE / "slim_latency.py"), *(f"{name}={path}" for name, path in files.items())]
    for found in replies(words, LIMIT) or ():
        if "missing" in found:
            print(f"{subject:14} {found['runtime']}: {found['missing']}")
            continue
        name = found["name"]
        note = f"{found['ratio']:.3g} x the speed of the unpruned network"
        note += f"; accuracy {accuracy[name]:.2f} %" if name in accuracy else ""
        yield row(
            subject, f"{name}, {found['runtime']}, batch {found['batch']}", found["ms"], "ms", note=note
        )


def row(subject: str, what: str, value: float, unit: str, target: str = "", *, note: str = "") -> Row:
    return Row("slim", subject, what, value, unit, target, note=note)


def one_run(argv: list[str]) -> int:
    """Our side of one run, as bench/slim_peer.py does for the others."""
    options = options_of(__doc__, [OURS, FAST]).parse_args(argv)
    torch.set_num_threads(1)
    print(json.dumps(asdict(own(options))))
    return 0


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--one"]:
        return one_run(argv[1:])
    mine = argparse.ArgumentParser(add_help=False)
    mine.add_argument(
        "--peers", metavar="PYTHON", default=os.environ.get("TERSOR_SLIM_PEERS", sys.executable)
    )
    mine.add_argument("--quick", action="store_true", help=f"one seed, {QUICK_SECONDS:g} s of tuning")
    mine.add_argument("--seconds", type=float, help="processor time of one tuning")
    mine.add_argument("--out", type=Path, help="keep the results here, and continue from those there")
    mine.add_argument("--at-once", type=int, default=AT_ONCE, help="processes")
    mine.add_argument("--untimed", action="store_true", help="no latency: for a machine with other load")
    options, _ = mine.parse_known_args(argv)
    return job.main(__doc__, partial(measure, options=options), tuple(SECONDS), argv, (mine,))


if __name__ == "__main__":
    sys.exit(main())
