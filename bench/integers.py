"""Integers: int8 files by Tersor, ONNX Runtime and NNCF: bytes, accuracy, speed, parity, memory.

python bench/integers.py [--peers PYTHON] [--peers-only] [--quick] [--rounds 40] [--out FOLDER] [--record]
                         [SUBJECT ...]
PYTHON is an interpreter with the peers (bench/integers_peer.py), by default TERSOR_INTEGER_PEERS or this one.
Each file is made in a process of its own from the same float network and the same 300 images. Then all run
side by side in one process (bench/integers_runtimes.py), with one thread.
speed        times as fast as the float file in the same runtime: median of the rounds' ratios. OpenVINO is
             pinned to float32; what it takes by itself is a row of its own
no slower    our time over that of the cell's fastest peer: the end of its 95 % interval, 1.03 at most
A/A          the float file over itself, which shows how much of a difference is noise
parity       our file beside the simulation in PyTorch, over all test images
memory       how much more a process takes at its peak to calibrate on 2,000 images than on 32
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import job
import numpy as np
import torch
from child import answer, peak, replies
from integers_peer import METHODS, Made, made, nbytes
from integers_rows import (
    FLOAT,
    OURS,
    SLOWER,
    Limits,
    Raced,
    accuracy_rows,
    file_rows,
    parity_rows,
    row,
    speed_rows,
)
from networks import load, task
from slim_peer import export
from table import Row
from torch import Tensor, nn

from tersor.core.run import run
from tersor.core.state import State
from tersor.errors import TersorError
from tersor.maths.statistics import median_interval
from tersor.measure.latency import Timing
from tersor.model.loader import TensorBatches
from tersor.model.task import Task
from tersor.steps import Export, Fold, Quantize

HERE = Path(__file__).resolve().parent
FILE, NO_FILE = "model.onnx", "-"
CALIBRATE, FEW, MANY = 300, 32, 2000  # images
ROUNDS = 40
LIMIT = 1800  # seconds of a process
HEAVY = ("ort-minmax", "ort-percentile")  # peers whose memory is measured
MEMORY = "<= 300"  # MB
SUBJECTS = {
    "resnet20": Limits("<= 340", "<= 0.1", SLOWER),
    "mobilenetv2": Limits("<= 950", "<= 0.1", SLOWER),
    "vgg": Limits(),
}


# Our side, in its own process


def ours(net: nn.Module | State, on: Task, out: Path | None) -> State:
    """Our int8 file, out / FILE; without `out` the network is calibrated only. All settings are here."""
    steps: list[Any] = [Fold(), Quantize(activations=8)]
    return run(net, [*steps, Export(path=FILE)], on, out=out) if out else run(net, steps, on)


def own(subject: str, images: Path, test: Path, out: Path) -> Made:
    """Our file, and what PyTorch answers for the test images when it simulates that file."""
    x = torch.from_numpy(np.load(images))
    y = torch.zeros(len(x), dtype=torch.int64)
    calibrate = TensorBatches(x, y, batch=100)
    # Without the whole data set, which would hide how much memory calibrating takes.
    on, net = Task("images", evaluate=calibrate, calibrate=calibrate), load(subject)
    only_calibrate = str(test) == NO_FILE
    began, before = time.process_time(), peak()
    state = ours(net, on, None if only_calibrate else out)
    found = made(OURS, out / FILE, began, before)
    if only_calibrate:  # writing a file may take more memory, which would hide it too
        return found
    np.save(out / "simulated.npy", answered(state.model().eval(), torch.from_numpy(np.load(test))))
    return replace(found, simulated=str(out / "simulated.npy"))


@torch.no_grad()
def answered(net: nn.Module, images: Tensor) -> np.ndarray:
    """[N, classes]"""
    return torch.cat([net(part) for part in images.split(250)]).numpy()


# All files of a subject


def peer_file(python: str, method: str, given: Path, images: Path, out: Path) -> Made | None:
    """A peer's file of a float .onnx file."""
    return one([python, str(HERE / "integers_peer.py"), method, *map(str, (given, images, out))])


def our_file(subject: str, images: Path, test: Path | str, out: Path) -> Made | None:
    return one([sys.executable, str(HERE / "integers.py"), "--one", subject, *map(str, (images, test, out))])


def one(words: list[str]) -> Made | None:
    """The file that a process made, None if its library is not installed."""
    found = replies(words, LIMIT)
    return Made(**found[-1]) if found else None


def race(
    python: str, files: dict[str, Path], test: Path, out: Path, *, rounds: int = ROUNDS,
    peers: Collection[str] = tuple(METHODS),
) -> Raced:  # fmt: skip
    """Run all files in all runtimes. The first one is the float network's; those of `peers` may fail."""
    words = [python, str(HERE / "integers_runtimes.py"), str(test), str(out), "--rounds", f"{rounds}"]
    raced = Raced({}, {}, {})
    for found in replies([*words, *(f"{name}={path}" for name, path in files.items())], LIMIT) or ():
        runtime = found["runtime"]
        if "missing" in found:
            print(f"{runtime}: {found['missing']}")
        elif "failed" in found:
            if found["name"] not in peers:
                raise TersorError(f"bench: {found['name']} does not run in {runtime}: {found['failed']}")
            print(f"{found['name']} in {runtime}: {found['failed']}")
        elif "outputs" in found:
            raced.outputs.setdefault(runtime, {})[found["name"]] = np.load(found["outputs"])
        else:
            cell = runtime, found["batch"]
            raced.load[cell] = found["load"]
            raced.times[cell] = {name: timing(times) for name, times in found["times"].items()}
    return raced


def timing(rounds: list[float]) -> Timing:
    """Times of a file, from another process."""
    return Timing(float(np.median(rounds)), *median_interval(rounds), tuple(rounds), calls=1)


class Inputs(NamedTuple):
    """What all files of a subject are made from and judged by."""

    images: Path  # to calibrate with, [300, 1, 28, 28]
    test: Path  # [10000, 1, 28, 28]
    given: Path  # the float network
    labels: np.ndarray  # of the test images


def inputs(subject: str, out: Path) -> Inputs:
    on = task(calibrate=CALIBRATE)
    out.mkdir(parents=True, exist_ok=True)
    found = Inputs(
        out / "calibrate.npy", out / "test.npy", out / "float.onnx", on.evaluate.dataset.tensors[1].numpy()
    )
    np.save(found.images, on.calibrate.dataset.tensors[0].numpy())
    np.save(found.test, on.evaluate.dataset.tensors[0].numpy())
    export(load(subject), found.given)
    return found


def measure(subject: str, options: argparse.Namespace) -> Iterator[Row]:
    limits = SUBJECTS[subject]
    with tempfile.TemporaryDirectory() as folder:
        out = (options.out or Path(folder)) / subject
        images, test, given, labels = inputs(subject, out)
        tried = [] if options.peers_only else [our_file(subject, images, test, out / OURS)]
        tried += [peer_file(options.peers, method, given, images, out / "peers") for method in METHODS]
        files = [found for found in tried if found]
        yield from file_rows(subject, nbytes(given), files, limits)
        paths = {FLOAT: given} | {found.method: Path(found.path) for found in files}
        raced = race(options.peers, paths, test, out, rounds=options.rounds)
        yield from accuracy_rows(subject, raced, labels, limits)
        yield from speed_rows(subject, raced, limits)
        if files and files[0].simulated:
            yield from parity_rows(subject, np.load(files[0].simulated), raced)
        if not options.quick:
            yield from memory_rows(subject, given, options, out)


def memory_rows(subject: str, given: Path, options: argparse.Namespace, out: Path) -> Iterator[Row]:
    """What more images cost. Each number of images in its own process."""
    x = task(calibrate=MANY).calibrate.dataset.tensors[0].numpy()
    paths = {count: out / f"calibrate-{count}.npy" for count in (FEW, MANY)}
    for count, path in paths.items():
        np.save(path, x[:count])
    for name in (() if options.peers_only else (OURS,)) + HEAVY:
        used = {}
        for count, path in paths.items():
            folder = out / f"memory-{count}"
            found = (
                our_file(subject, path, NO_FILE, folder)
                if name == OURS
                else peer_file(options.peers, name, given, path, folder)
            )
            if found:
                used[count] = found.memory
        if len(used) == len(paths):
            more = used[MANY] - used[FEW]
            note = f"{used[FEW]:.0f} to {used[MANY]:.0f} MB"
            target = MEMORY if name == OURS else ""
            what = f"{name}, memory of {MANY} images over {FEW}"
            yield row(subject, what, round(more, 1), "MB", target, note=note)


def one_file(argv: list[str]) -> int:
    """Our side of one file, as bench/integers_peer.py does for the others.

    SUBJECT IMAGES.npy TEST.npy FOLDER; with "-" as TEST.npy it calibrates and writes no file.
    """
    lines = answer()
    torch.set_num_threads(1)
    subject, *paths = argv
    lines.write(json.dumps(asdict(own(subject, *map(Path, paths)))) + "\n")
    return 0


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--one"]:
        return one_file(argv[1:])
    mine = argparse.ArgumentParser(add_help=False)
    mine.add_argument(
        "--peers", metavar="PYTHON", default=os.environ.get("TERSOR_INTEGER_PEERS", sys.executable)
    )
    mine.add_argument("--peers-only", action="store_true", help="without our file")
    mine.add_argument("--quick", action="store_true", help="without memory")
    mine.add_argument(
        "--rounds", type=int, default=ROUNDS, help="of timing; more on a machine with other load"
    )
    mine.add_argument("--out", type=Path, help="keep the files and their outputs here")
    options, _ = mine.parse_known_args(argv)
    return job.main(__doc__, partial(measure, options=options), tuple(SUBJECTS), argv, (mine,))


if __name__ == "__main__":
    sys.exit(main())
