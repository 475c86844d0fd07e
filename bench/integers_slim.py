"""Integers slim: channels removed, tuned, then int8: ours, and Torch-Pruning with NNCF.

python bench/integers_slim.py [--pruners PYTHON] [--peers PYTHON] [--quick] [--rounds 40] [--out FOLDER]
                              [--record] [SUBJECT ...]
ours    slim to 1/2 and 1/4 of the MACs in multiples of 16 channels, tuned, folded, quantized, exported
peers   bench/slim_peer.py, in multiples of 1, 8 and 16, tuned for the same seconds; then NNCF on its .onnx
        file, or on OpenVINO's model of it
PYTHON: interpreters of bench/slim.py (default: TERSOR_SLIM_PEERS) and of bench/integers.py (default:
TERSOR_INTEGER_PEERS). All files run side by side, as in bench/integers.py. In each runtime and batch the
fastest file of each side counts, of those that lose at most 0.3 points to the float network there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import integers
import job
import numpy as np
import slim
import torch
from child import answer, replies
from integers_peer import Made, made, nbytes
from integers_rows import FLOAT, Limits, Raced, accuracy_rows, file_rows, speed_rows
from networks import load, task
from slim_peer import BATCH, options_of
from table import Row

from tersor.measure.latency import ratio

FACTORS, MULTIPLE, MULTIPLES = (2, 4), 16, (1, 8, 16)
QUANTIZERS = ("nncf-onnx-mixed", "nncf-openvino-mixed")
LOSS = 0.3  # points
CELLS = [(runtime, batch) for runtime in ("ONNX Runtime", "OpenVINO") for batch in (1, 64)]
SPEED: dict[str, dict[tuple[str, int], str]] = {
    "resnet20": {("ONNX Runtime", 1): ">= 3", ("ONNX Runtime", 64): ">= 3.5"},
    "vgg": dict.fromkeys(CELLS, ">= 6"),
}


def own(options: argparse.Namespace) -> Made:
    """Our file of one factor, in its own process."""
    given, on = load(options.subject), slim.flipping(task(batch=BATCH, calibrate=slim.CALIBRATE))
    found, state = slim.tuned(given, on, options)
    images = task(calibrate=integers.CALIBRATE).calibrate
    integers.ours(state, replace(on, calibrate=images), options.out)
    file = made(f"ours {options.factor:g}x", options.out / integers.FILE, 0.0, 0.0)
    return replace(file, seconds=found.pruning + found.tuning)


def our_files(subject: str, seconds: float, out: Path) -> Iterator[Made]:
    for factor in FACTORS:
        words = slim.command(
            sys.executable, subject, factor, slim.OURS, multiple=MULTIPLE, seconds=seconds,
            out=out / f"ours-{factor}x",
        )  # fmt: skip
        words[1] = str(Path(__file__).resolve())
        (found,) = replies(words, slim.LIMIT) or ()
        yield Made(**found)


def peer_files(
    subject: str, seconds: float, images: Path, out: Path, options: argparse.Namespace
) -> Iterator[Made]:
    for factor in FACTORS:
        for multiple in MULTIPLES:
            words = slim.command(
                options.pruners, subject, factor, slim.BASIS, multiple=multiple, seconds=seconds, out=out
            )
            pruned = slim.outcome(words)
            if not pruned:
                continue
            name = f"{slim.BASIS} {slim.Point(factor, multiple)}"
            for method in QUANTIZERS:
                folder = out / f"{factor}x-{multiple}"
                found = integers.peer_file(options.peers, method, Path(pruned.onnx), images, folder)
                if found:
                    yield replace(found, method=f"{name}, {method}", seconds=pruned.pruning + pruned.tuning)


def measure(subject: str, options: argparse.Namespace) -> Iterator[Row]:
    seconds = slim.QUICK_SECONDS if options.quick else slim.SECONDS[subject]
    with tempfile.TemporaryDirectory() as folder:
        out = (options.out or Path(folder)) / f"{subject}-slim"
        images, test, given, labels = integers.inputs(subject, out)
        mine = [] if options.peers_only else list(our_files(subject, seconds, out))
        theirs = list(peer_files(subject, seconds, images, out, options))
        names = {found.method for found in theirs}
        paths = {FLOAT: given} | {found.method: Path(found.path) for found in (*mine, *theirs)}
        raced = integers.race(options.peers, paths, test, out, rounds=options.rounds, peers=names)
        rows = [
            *file_rows(subject, nbytes(given), [*mine, *theirs], Limits()),
            *accuracy_rows(subject, raced, labels, Limits()),
            *speed_rows(subject, raced, Limits()),
            *best_rows(subject, raced, labels, {found.method for found in mine}, names),
        ]
    for row in rows:
        yield row._replace(bench="integers_slim")


# Rows


def best_rows(
    subject: str, raced: Raced, labels: np.ndarray, mine: Collection[str], theirs: Collection[str]
) -> Iterator[Row]:
    """The fastest file of each side in each cell that is still accurate: times as fast as the float one."""
    for cell, times in raced.times.items():
        runtime, batch = cell
        near = accurate(raced.outputs[runtime], labels)
        for side, names, target in (("ours", mine, SPEED[subject].get(cell, "")), ("peers", theirs, "")):
            if not names:
                continue
            what = f"{side}, best speed, {runtime}, batch {batch}"
            among = {name: times[name].median_ms for name in near & set(names) & set(times)}
            if not among:
                note = f"no file within {LOSS} points"
                yield Row("integers", subject, what, 0.0, "x", target, note=note)
                continue
            name = min(among, key=among.__getitem__)
            middle, low, high = ratio(times[FLOAT], times[name])
            note = f"{name}; 95 % interval {low:.3f} to {high:.3f}"
            yield Row("integers", subject, what, round(middle, 3), "x", target, note=note)


def accurate(outputs: dict[str, np.ndarray], labels: np.ndarray) -> set[str]:
    """The files that lose at most LOSS points to the float one."""
    right = {name: int((found.argmax(1) == labels).sum()) for name, found in outputs.items()}
    most = LOSS / 100 * len(labels)
    return {name for name, count in right.items() if right[FLOAT] - count <= most + 1e-9}


def one_file(argv: list[str]) -> int:
    options = options_of(__doc__, [slim.OURS]).parse_args(argv)
    lines = answer()
    torch.set_num_threads(1)
    lines.write(json.dumps(asdict(own(options))) + "\n")
    return 0


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--one"]:
        return one_file(argv[1:])
    mine = argparse.ArgumentParser(add_help=False)
    for word, variable in (("--pruners", "TERSOR_SLIM_PEERS"), ("--peers", "TERSOR_INTEGER_PEERS")):
        mine.add_argument(word, metavar="PYTHON", default=os.environ.get(variable, sys.executable))
    mine.add_argument("--peers-only", action="store_true", help="without our files")
    mine.add_argument("--quick", action="store_true", help=f"{slim.QUICK_SECONDS:g} s of tuning")
    mine.add_argument("--rounds", type=int, default=integers.ROUNDS, help="of timing")
    mine.add_argument("--out", type=Path, help="keep the files and their outputs here")
    options, _ = mine.parse_known_args(argv)
    return job.main(__doc__, partial(measure, options=options), tuple(SPEED), argv, (mine,))


if __name__ == "__main__":
    sys.exit(main())
