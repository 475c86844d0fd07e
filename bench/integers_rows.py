"""Integers rows: the rows of bench/integers.py, from files, what they answered and how long they took."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import job
import numpy as np
import torch
from integers_peer import METHODS, Made
from integers_runtimes import AGAIN
from table import Row

from tersor.measure.latency import Timing, ratio

FLOAT, OURS = "float", "ours"
AGREE, OFF, SLOWER = ">= 99.9", "<= 0.01", "<= 1.03"
LEVELS = 256  # of a grid of 8 bits


class Limits(NamedTuple):
    """Targets of a subject: all that ours has to reach beyond parity and memory."""

    file: str = ""  # kB
    drop: str = ""  # points
    slower: str = ""  # times the fastest peer's time


class Raced(NamedTuple):
    """What the runtimes answered."""

    outputs: dict[str, dict[str, np.ndarray]]  # runtime -> file -> [N, classes]
    times: dict[tuple[str, int], dict[str, Timing]]  # runtime, batch -> file -> times
    load: dict[tuple[str, int], float]  # of the machine


def file_rows(subject: str, given: int, files: list[Made], limits: Limits) -> Iterator[Row]:
    """`given`: bytes of the float file."""
    yield row(subject, f"{FLOAT}, file", given / 1000, "kB")
    for found in files:
        note = f"{found.seconds:.0f} s of processor time; {given / found.nbytes:.2f} x smaller"
        note += f"; without the exporter's traces {found.bare / 1000:.1f} kB" if found.bare else ""
        target = limits.file if found.method == OURS else ""
        yield row(subject, f"{found.method}, file", found.nbytes / 1000, "kB", target, note=note)
    peers = [found.bare or found.nbytes for found in files if found.method != OURS]
    for found in files:
        if found.method == OURS and peers:
            over = 100 * (found.nbytes / min(peers) - 1)
            yield row(subject, "file over the smallest peer's without traces", over, "%")


def accuracy_rows(subject: str, raced: Raced, labels: np.ndarray, limits: Limits) -> Iterator[Row]:
    for runtime, outputs in raced.outputs.items():
        right = {
            name: torch.from_numpy((found.argmax(1) == labels).astype(np.float64))
            for name, found in outputs.items()
        }
        for name, scores in right.items():
            if name == AGAIN:
                continue
            fall, note = job.lost(right[FLOAT], scores)
            value = 100 * float(scores.mean())
            yield row(
                subject,
                f"{name}, accuracy, {runtime}",
                value,
                "%",
                note="" if name == FLOAT else f"drop {fall.amount:.2f}, {note}",
            )
            if name == OURS:
                yield row(subject, f"{name}, drop, {runtime}", fall.amount, "points", limits.drop, note=note)


def speed_rows(subject: str, raced: Raced, limits: Limits) -> Iterator[Row]:
    for cell, times in raced.times.items():
        runtime, batch = cell
        where = f"{runtime}, batch {batch}"
        for name, found in times.items():
            if name in (FLOAT, AGAIN):
                continue
            middle, low, high = ratio(times[FLOAT], found)
            note = f"95 % interval {low:.3f} to {high:.3f}; {found.median_ms:.4g} ms"
            yield row(subject, f"{name}, speed, {where}", round(middle, 3), "x", note=note)
        middle, low, high = ratio(times[AGAIN], times[FLOAT])
        note = f"95 % interval {low:.3f} to {high:.3f}; {times[FLOAT].median_ms:.4g} ms; "
        note += f"load of the machine {raced.load[cell]}"
        yield row(subject, f"A/A, {where}", round(middle, 3), "x", note=note)
        peer = fastest(times)
        if peer and OURS in times:
            middle, low, high = ratio(times[OURS], times[peer])
            note = f"{peer}; {middle:.3f}, 95 % interval {low:.3f} to {high:.3f}"
            what = f"time over the fastest peer's, {where}, at most"
            yield row(subject, what, round(high, 3), "x", limits.slower, note=note)


def fastest(times: dict[str, Timing]) -> str:
    """The peer with the least median, "" if there is none."""
    peers = {name: found.median_ms for name, found in times.items() if name in METHODS}
    return min(peers, key=peers.__getitem__, default="")


def parity_rows(subject: str, simulated: np.ndarray, raced: Raced) -> Iterator[Row]:
    for runtime, outputs in raced.outputs.items():
        if OURS not in outputs:
            continue
        found, step = outputs[OURS], step_of(simulated)
        agree = 100 * float((found.argmax(1) == simulated.argmax(1)).mean())
        yield row(subject, f"decisions as simulated, {runtime}", agree, "%", AGREE)
        apart = np.abs(found.astype(np.float64) - simulated)
        share = float(apart.max() / np.abs(simulated).max())
        note = f"{100 * share:.3g} % of the largest output"
        if step:
            steps = np.rint(apart / step)
            note += f"; {steps.max():.0f} steps of the outputs' grid"
            off = 100 * float((steps > 0).mean())
            yield row(subject, f"outputs off by a step, {runtime}", off, "%", OFF)
        yield row(subject, f"largest difference from simulated, {runtime}", float(apart.max()), note=note)


def step_of(values: np.ndarray, most: int = LEVELS) -> float:
    """The step of the grid that the values are on, 0 if they have more than `most` different values."""
    levels = np.unique(values)
    return float(np.diff(levels).min()) if 1 < len(levels) <= most else 0.0


def row(subject: str, what: str, value: float, unit: str = "", target: str = "", *, note: str = "") -> Row:
    return Row("integers", subject, what, value, unit, target, note=note)
