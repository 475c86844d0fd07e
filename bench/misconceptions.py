"""Misconceptions: (i) of docs/tables.md: what is often said, beside the rows that settle it.

refuted     a row's 95 % interval excludes the claim; a noisy row settles nothing
not refuted no measured row excludes it: the rows are shown all the same
Each claim is a function of the rows, so that its verdict changes with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from comparison_rows import INTEGERS, TABLES, Trial
from comparison_tables import NAMES, NONE, Rows, alone, at_equal_bytes, gains, interval, measured
from page import table
from rows_file import Row

from tersor.maths.statistics import paired

SHOWN = 3  # measurements of a claim, those against it first


class Sign(NamedTuple):
    """One measurement that bears on a claim, and whether it excludes it."""

    against: bool
    text: str


class Claim(NamedTuple):
    text: str
    signs: Callable[[Rows], Sequence[Sign]]
    row: str  # the rows that settle it


def speeds(trials: Sequence[Trial], rows: Rows, most: Callable[[Row], float], what: str) -> Iterator[Sign]:
    """Times as fast in each runtime; against a claim that it is at least `most`."""
    for trial, row in measured(trials, rows):
        for name, found in row.get("runtimes", {}).items():
            asked, noise = most(row), ", noisy" if found["noisy"] else ""
            against = found["ratio"][2] < asked and not found["noisy"]
            said = what.format(asked=asked)
            text = f"{trial.net}{said}: {interval(found['ratio'])} x in {NAMES[name]}{noise}"
            yield Sign(against, text)


def chosen(letter: str, *starts: str) -> list[Trial]:
    return [trial for trial in TABLES[letter] if trial.words.startswith(starts)]


def zeros(rows: Rows) -> list[Sign]:
    return list(speeds(chosen("a", "prune keep=0.1 "), rows, lambda row: 10.0, ", 90 % zeros"))


def operations(rows: Rows) -> list[Sign]:
    trials = chosen("a", "slim keep=0.4 ") + [trial for trial in TABLES["g"] if trial.timed]
    return list(speeds(trials, rows, fewer_macs, ", {asked:.2f} x fewer MACs"))


def fewer_macs(row: Row) -> float:
    return float(row["macs"][0] / row["macs"][1])


def small_files(rows: Rows) -> list[Sign]:
    return list(speeds(chosen("a", "quantize bits=4"), rows, fewer_bytes, ", {asked:.1f} x fewer bytes"))


def fewer_bytes(row: Row) -> float:
    return float(row["bytes"]["given"] / row["bytes"]["coded"])


def zeros_in_files(rows: Rows) -> list[Sign]:
    found = []
    for trial, row in measured(chosen("a", "prune keep=0.1 "), rows):
        given, plain, coded = (row["bytes"][word] for word in ("given", "plain", "coded"))
        text = f"{trial.net}: {given:,} bytes; with 90 % zeros {plain:,}; coded {coded:,}"
        found.append(Sign(plain > given / 10, text))
    return found


def integers(rows: Rows) -> list[Sign]:
    """By time, and by processor time: the intervals of a thousand calls of both files do not touch."""
    found = list(speeds(TABLES["i"], rows, lambda row: 1.0, ", int8"))
    for trial, row in measured(TABLES["i"], rows):
        for name, both in row.get("runtimes", {}).items():
            was, now = alone(both, "seconds")
            text = f"{interval(was, 3)}, int8 {interval(now, 3)} processor s of 1,000 calls in {NAMES[name]}"
            found.append(Sign(now[1] > was[2], f"{trial.net}: {text}"))
    return found


def four_bits(rows: Rows) -> list[Sign]:
    trials = [trial for trial in TABLES["c"] if trial.words == "quantize bits=4 entropy"]
    trials += [trial for trial in TABLES["d"] if trial.words == "quantize bits=4 per=tensor entropy"]
    return [
        Sign(
            row["accuracy"]["drop"][1] > 0,
            f"`{trial.words}`: drop {interval(row['accuracy']['drop'])} points",
        )
        for trial, row in measured(trials, rows)
    ]


def shared(rows: Rows) -> list[Sign]:
    """The best k-means file in the bytes of a linear one loses more: the intervals do not touch."""
    found = []
    for trial, row, best in at_equal_bytes(rows):
        if (means := best.get("k-means")) is None:
            continue
        (label, other), falls = means, [each["accuracy"]["drop"] for each in (row, means[1])]
        sizes = [each["bytes"]["coded"] for each in (row, other)]
        text = f"{sizes[1]:,} bytes, {label.label}: {interval(falls[1])} points; "
        text += f"{sizes[0]:,} bytes, {trial.label}: {interval(falls[0])}"
        found.append(Sign(falls[1][1] > falls[0][2], text))
    return found


def teachers(rows: Rows) -> list[Sign]:
    found = []
    for net, (apart, taught) in gains(rows).items():
        if len(apart) < 2:
            continue
        gain, low, high, _ = paired(apart, taught)
        found.append(
            Sign(high < 0, f"{net}: {gain:+.2f} ({low:+.2f} to {high:+.2f}) points, {len(apart)} seeds")
        )
    return found


CLAIMS = (
    Claim("90 % zeros make a network ten times as fast.", zeros, "(a) pruning, single weights"),
    Claim("A network with k times fewer MACs is k times as fast.", operations, "(a) pruning, channels; (g)"),
    Claim("90 % zeros make a file ten times smaller.", zeros_in_files, "(a) pruning, single weights"),
    Claim("A file k times smaller runs k times as fast.", small_files, "(a) quantization, 4-bit weights"),
    Claim("An int8 file is always faster.", integers, f"`{INTEGERS}` of three networks"),
    Claim("4 bits round without loss.", four_bits, "(c) and (d), 4 bits, rounded"),
    Claim("Shared values (k-means) beat linear levels at equal bytes.", shared, "(d), coded"),
    Claim("A teacher always helps a student.", teachers, "(e)"),
)


def text(rows: Rows) -> str:
    return table(
        ("said", "verdict", "measured", "rows"), [line(claim, claim.signs(rows)) for claim in CLAIMS]
    )


def line(claim: Claim, signs: Sequence[Sign]) -> tuple[str, ...]:
    verdict = NONE if not signs else "**refuted**" if any(sign.against for sign in signs) else "not refuted"
    first = sorted(signs, key=lambda sign: not sign.against)
    more = [f"{len(first) - SHOWN} more"] if len(first) > SHOWN else []
    return (claim.text, verdict, "; ".join([*(sign.text for sign in first[:SHOWN]), *more]), claim.row)
