"""Memory: peak memory and seconds of packing and unpacking a large checkpoint.

python bench/memory.py [--megabytes 1024] [--tensors 64] [--sharded 8192] [--record]
One file of float32 tensors of one size: peaks above an interpreter with torch loaded. A sharded checkpoint
like those of language models (--sharded 0 leaves it out; it needs twice its size on disk): the whole peak.
Both are made in a temporary folder and removed. Each job is a separate process; its peak is the kernel's
high-water mark of resident memory. Seconds are wall-clock, disk included.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from table import Row, record

LIMIT = 600  # MB above the interpreter with torch loaded
WHOLE_LIMIT = 1500  # MB of a process that packs or unpacks a sharded checkpoint
MB = 1_000_000
SHARD = 2_000_000_000  # bytes of tensors in a shard, about

# A block of a language model of 7e9 weights, in bfloat16; every fourth block is float32, as are all norms.
VOCABULARY, WIDTH, INNER = 32000, 4096, 11008
BLOCK = {
    "attn.q": (WIDTH, WIDTH), "attn.k": (WIDTH, WIDTH), "attn.v": (WIDTH, WIDTH), "attn.o": (WIDTH, WIDTH),
    "mlp.gate": (INNER, WIDTH), "mlp.up": (INNER, WIDTH), "mlp.down": (WIDTH, INNER), "norm": (WIDTH,),
}  # fmt: skip
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
job, words, weights, packed, unpacked, shard = sys.argv[1:]
from tersor.io.pack import pack
from tersor.io.unpack import unpack
from tersor.steps import recipe_from_words

if job == "pack":
    pack(weights, packed, recipe_from_words(words.split()))
else:
    unpack(packed, unpacked, shard=int(shard) or None)
print(peak(), before, time.perf_counter() - began)
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


def sharded_tensors(nbytes: int) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Names, dtypes and shapes: the embedding, then blocks until there are so many bytes."""
    found = [("embed.weight", torch.bfloat16, (VOCABULARY, WIDTH))]
    block = 0
    while sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in found) < nbytes:
        for name, shape in BLOCK.items():
            wide = block % 4 == 3 or len(shape) == 1
            dtype = torch.float32 if wide else torch.bfloat16
            found.append((f"blocks.{block}.{name}.weight", dtype, shape))
        block += 1
    return found


def made_up(number: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Normal weights, scaled row by row."""
    rng = np.random.default_rng(number)
    values = rng.standard_normal(shape, dtype=np.float32)
    rows = np.exp(rng.normal(-4.0, 0.3, shape[0])).astype(np.float32)
    values *= rows.reshape(-1, *[1] * (len(shape) - 1))
    return torch.from_numpy(values).to(dtype)


def write_sharded(folder: Path, nbytes: int) -> None:
    """A folder of shards with an index, one shard in memory at a time."""
    folder.mkdir()
    parts: list[list[tuple[int, str, torch.dtype, tuple[int, ...]]]] = [[]]
    size = 0
    for number, (name, dtype, shape) in enumerate(sharded_tensors(nbytes)):
        if size >= SHARD:
            parts, size = [*parts, []], 0
        parts[-1].append((number, name, dtype, shape))
        size += math.prod(shape) * dtype.itemsize
    where = {}
    for count, part in enumerate(parts, 1):
        file = f"model-{count:05d}-of-{len(parts):05d}.safetensors"
        save_file({name: made_up(number, dtype, shape) for number, name, dtype, shape in part}, folder / file)
        where |= {name: file for _, name, *_ in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of each tensor of a folder of shards."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                raw = file.get_tensor(name).reshape(-1).view(torch.uint8).numpy()
                found[name] = hashlib.sha256(raw.data).hexdigest()
    return found


def same_payload(folder: Path, nbytes: int) -> bool:
    """Whether two files end with the same bytes."""
    with (folder / "weights.safetensors").open("rb") as a, (folder / "unpacked.safetensors").open("rb") as b:
        for file in (a, b):
            file.seek(-nbytes, 2)
        return all(a.read(MB) == b.read(MB) for _ in range(-(-nbytes // MB)))


def measured(job: str, words: str, folder: Path, shard: int = 0) -> tuple[float, float, float]:
    """(peak in MB, peak of an interpreter with torch, seconds) of one job."""
    ending = "" if shard else ".safetensors"
    files = (folder / f"weights{ending}", folder / "packed.tersor", folder / f"unpacked{ending}")
    command = [sys.executable, "-c", RUN, job, words, *map(str, files), str(shard)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    peak, before, seconds = map(float, done.stdout.split())
    return peak / MB, before / MB, seconds


def sharded_rows(megabytes: int) -> list[Row]:
    """Pack and unpack a sharded checkpoint, losslessly."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="tersor-bench-") as name:
        folder = Path(name)
        write_sharded(folder / "weights", megabytes << 20)
        given = sum(path.stat().st_size for path in (folder / "weights").iterdir())
        largest = max(math.prod(s) * d.itemsize for _, d, s in sharded_tensors(megabytes << 20))
        subject = f"{megabytes} MiB, sharded, largest tensor {largest / MB:.0f} MB"
        for job in ("pack", "unpack"):
            if job == "unpack":  # the disk need not hold all three
                before = digests(folder / "weights")
                shutil.rmtree(folder / "weights")
            peak, _, seconds = measured(job, "entropy", folder, SHARD)
            stored = (folder / "packed.tersor").stat().st_size
            note = f"{given / MB:.0f} MB to {stored / MB:.0f} MB" if job == "pack" else ""
            rows.append(
                Row("memory", subject, f"whole peak, {job}", peak, "MB", f"<= {WHOLE_LIMIT}", note=note)
            )
            rows.append(Row("memory", subject, f"speed, {job}", given / MB / seconds, "MB/s"))
            print(
                f"{job + ', sharded':18} {peak:6.0f} MB {given / MB / seconds:6.1f} MB/s  {note}", flush=True
            )
        if digests(folder / "unpacked") != before:
            raise SystemExit("memory: the lossless file does not give back the sharded weights")
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=1024, help="size of the checkpoint, in MiB")
    parser.add_argument("--tensors", type=int, default=64, help="tensors in the checkpoint")
    parser.add_argument("--sharded", type=int, default=8192, help="size of the sharded checkpoint, in MiB")
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
            high, before, seconds = measured(what, words, folder)
            peak = high - before
            stored = (folder / "packed.tersor").stat().st_size
            note = f"{given / MB:.0f} MB to {stored / MB:.0f} MB" if what == "pack" else ""
            print(f"{job:18} {peak:6.0f} MB {given / MB / seconds:6.1f} MB/s  {note}", flush=True)
            rows.append(Row("memory", subject, f"peak, {job}", peak, "MB", f"<= {LIMIT}", note=note))
            rows.append(Row("memory", subject, f"speed, {job}", given / MB / seconds, "MB/s"))
            if words == "entropy" and what == "unpack" and not same_payload(folder, options.megabytes << 20):
                raise SystemExit("memory: the lossless file does not give back the weights")
    rows += sharded_rows(options.sharded) if options.sharded else []
    if options.record:
        record(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
