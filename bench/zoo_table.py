"""Zoo table: (h) of docs/tables.md, as text, from the rows of src/tersor/zoo/measured.jsonl."""

from __future__ import annotations

from comparison_tables import interval, share
from page import table
from rows_file import Row

from tersor.zoo.architectures import ZOO

COLUMNS = (
    "zoo:", "metric", "before, %", "after, %", "drop, points (95 %)", "fp32 file, bytes", "`.tersor`, bytes",
    "int8 ONNX, bytes", "float, ms", "int8, ms", "times as fast (95 %)",
)  # fmt: skip
PEER = (
    "zoo:", "drop, points (95 %), NNCF", "ours", "int8 ONNX, bytes, NNCF", "ours",
    "times as fast as NNCF's, ONNX Runtime (95 %)", "OpenVINO (95 %)",
)  # fmt: skip
HOW = ("zoo:", "trained by", "compressed by", "training, s", "compressing, s", "measured on")
HEAD = """
## (h) The zoo

`bench/tables.py` trains a network from random weights on 30,000 composed scenes (`--recipe zoo:NAME`),
compresses it (`--recipe zoo:NAME:small`), and compares the two ONNX files in ONNX Runtime.

* **before, after**: the float file and the int8 file, each scored in ONNX Runtime on the same 1,000 test
  scenes, whose garments and photographs are in no training scene. **drop**: paired by scene.
* **bytes**: the float weights as safetensors; the `.tersor` file, without a ledger (`--tiny`); the int8 file
  that the runtime opens.
* **ms**: one image, one thread; both files take turns in one process. The ratio is the median of the rounds'
  ratios. "noisy" marks a run in which the float file against itself was not 1 within its interval: other
  programs used the machine.
* "quick" rows had 2 % of the training and say only that everything runs.

"""
BESIDE = """
### Beside NNCF

NNCF's int8 file of the same float network, calibrated on the same 300 scenes, not cut and not trained. Both
files take turns in one process, one image, one thread.

"""
MIDDLE = """
### How each row was measured

Seconds are of processor time, all threads together, on a machine that others may have used.

"""


def text(rows: list[Row]) -> str:
    by_name = {row["name"]: row for row in rows}
    lines = [line(name, by_name.get(name)) for name in ZOO]
    peers = [peer(row) for name in ZOO if (row := by_name.get(name)) and row.get("peer")]
    return (
        HEAD + table(COLUMNS, lines) + (BESIDE + table(PEER, peers) if peers else "")
        + MIDDLE + table(HOW, map(how, rows))
    )  # fmt: skip


def line(name: str, row: Row | None) -> tuple[str, ...]:
    """An architecture's line in (h)."""
    if row is None:
        return (name, "not measured", *[""] * (len(COLUMNS) - 2))
    accuracy, latency, size = row["accuracy"], row["latency"], row["bytes"]
    was, now, drop = (accuracy[key] for key in ("before", "after", "drop"))
    return (
        name + (" (quick)" if row["quick"] else ""), row["metric"],
        f"{100 * was[0]:.1f}", f"{100 * now[0]:.1f}", interval(drop), f"{size['float']:,}",
        *(share(size[key], size["float"]) for key in ("packed", "onnx")),
        f"{latency['before'][0]:.2f}", f"{latency['after'][0]:.2f}",
        interval(latency["ratio"]) + (", noisy" if latency["noisy"] else ""),
    )  # fmt: skip


def peer(row: Row) -> tuple[str, ...]:
    """An architecture's line beside NNCF."""
    theirs, latency = row["peer"], row["peer"]["latency"]
    return (
        row["name"] + (" (quick)" if row["quick"] else ""),
        interval(theirs["accuracy"]["drop"]), interval(row["accuracy"]["drop"]),
        f"{theirs['bytes']:,}", f"{row['bytes']['onnx']:,}",
        *(interval(found["ratio"]) + (", noisy" if found["noisy"] else "") for found in latency.values()),
    )  # fmt: skip


def how(row: Row) -> tuple[str, ...]:
    spent = [row["seconds"][word] for word in ("float", "small")]
    return (
        row["name"], f"`{row['trained']}`", f"`{row['compressed']}`",
        *("" if value is None else f"{value}" for value in spent), row["machine"],
    )  # fmt: skip
