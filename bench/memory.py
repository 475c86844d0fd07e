"""Memory: what packing and unpacking a large checkpoint takes, above an interpreter with torch loaded.

python bench/memory.py [--megabytes 1024] [--tensors 64] [--record]
The checkpoint is made in a temporary folder and removed. Each job is a process of its own; its peak is the
kernel's high-water mark of resident memory. Seconds are of the clock, disk included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from table import Row, record

LIMIT = 600  # MB above the interpreter with torch loaded
MB = 1_000_000
JOBS = {
    "pack, lossless": ("pack", "entropy"),
    "unpack, lossless": ("unpack", "entropy"),
    "pack, 8 bits": ("pack", "quantize entropy"),
    "unpack, 8 bits": ("unpack", "quantize entropy"),
}
RUN = """
import sys, time

def peak():
    try:
        lines = open("/proc/self/status").read().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except OSError:
        import resource
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return used if sys.platform == "darwin" else 1024 * used

import torch

before, began = peak(), time.perf_counter()
job, words, weights, packed, unpacked = sys.argv[1:]
from tersor.io import pack, unpack
from tersor.steps import recipe_from_words

if job == "pack":
    pack(weights, packed, recipe_from_words(words.split()))
else:
    unpack(packed, unpacked)
print(peak() - before, time.perf_counter() - began)
"""


def write_checkpoint(path: Path, nbytes: int, tensors: int) -> None:
    """Normal weights as a safetensors file, one tensor in memory at a time."""
    rows = nbytes // tensors // 4 // 1024
    header, at = {}, 0
    for number in range(tensors):
        size = rows * 1024 * 4
        entry = {"dtype": "F32", "shape": [rows, 1024], "data_offsets": [at, at + size]}
        header[f"blocks.{number}.weight"] = entry
        at += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for number in range(tensors):
            rng = np.random.default_rng(number)
            (rng.standard_normal((rows, 1024), dtype=np.float32) * np.float32(0.02)).tofile(file)


def same_payload(folder: Path, nbytes: int) -> bool:
    """Whether two files end with the same bytes."""
    with (folder / "weights.safetensors").open("rb") as a, (folder / "unpacked.safetensors").open("rb") as b:
        for file in (a, b):
            file.seek(-nbytes, 2)
        return all(a.read(MB) == b.read(MB) for _ in range(-(-nbytes // MB)))


def measured(job: str, words: str, folder: Path) -> tuple[float, float]:
    """(peak in MB above the interpreter with torch, seconds) of one job."""
    files = (folder / "weights.safetensors", folder / "packed.tersor", folder / "unpacked.safetensors")
    command = [sys.executable, "-c", RUN, job, words, *map(str, files)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    peak, seconds = map(float, done.stdout.split())
    return peak / MB, seconds


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=1024, help="size of the checkpoint, in MiB")
    parser.add_argument("--tensors", type=int, default=64, help="tensors in the checkpoint")
    parser.add_argument("--record", action="store_true", help="put the numbers into bench/results.csv")
    options = parser.parse_args(argv)
    subject = f"{options.megabytes} MiB, {options.tensors} tensors"
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="tersor-bench-") as name:
        folder = Path(name)
        weights = folder / "weights.safetensors"
        write_checkpoint(weights, options.megabytes << 20, options.tensors)
        given = weights.stat().st_size
        for job, (what, words) in JOBS.items():
            peak, seconds = measured(what, words, folder)
            stored = (folder / "packed.tersor").stat().st_size
            note = f"{given / MB:.0f} MB to {stored / MB:.0f} MB" if what == "pack" else ""
            print(f"{job:18} {peak:6.0f} MB {given / MB / seconds:6.1f} MB/s  {note}", flush=True)
            rows.append(Row("memory", subject, f"peak, {job}", peak, "MB", f"<= {LIMIT}", note=note))
            rows.append(Row("memory", subject, f"speed, {job}", given / MB / seconds, "MB/s"))
            if words == "entropy" and what == "unpack" and not same_payload(folder, options.megabytes << 20):
                raise SystemExit("memory: the lossless file does not give back the weights")
    if options.record:
        record(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
