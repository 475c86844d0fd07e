"""Bytes: Tersor's lossless streams and their speed, compared with zstd, zipnn, ANS and nncodec.

python bench/bytes.py [--peers PYTHON] [--rounds 7] [--record] [SUBJECT ...]
PYTHON is an interpreter with the peers (`pip install 'tersor[peers]'`; nncodec needs numpy 1), by default
TERSOR_PEERS or this one. Bytes are those of whole leaves, headers and tables included; "file" is a .tersor
file of all leaves. Speeds are wall-clock, from one run: in each round every coder decodes once, one after the
other, and the result is the median of the rounds; for ratios, the median of the rounds' ratios. A code counts
as a byte. Tersor decodes like `load`, leaf by leaf on all cores; the peers use one. Encoding is timed for
floats, in memory, Tersor (with the profile that takes fewer bytes) and zipnn on all cores. Notes give the
speed by CPU time, which other load on the machine changes less.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import codes
import job
import numpy as np
import torch
from safetensors.torch import save_file
from table import Row
from torch import Tensor

import tersor
from tersor.coders import order0_bits
from tersor.core.recipe import Recipe
from tersor.encode import coded
from tersor.errors import TersorError
from tersor.forms.coded import Coded
from tersor.io.pool import in_order
from tersor.steps.entropy import Entropy

HERE = Path(__file__).resolve().parent
PROFILES = ("max", "fast")  # fewest bytes, or speed
OURS = "Tersor"
ROUNDS = 7
# Most bits a weight, by subject.
MOST = {"minilm_int8": 7.09, "minilm_int4": 3.285, "lenet300": 0.465, "lenet5": 0.495}
DENSE = ("minilm_int8", "minilm_int4")  # subjects with a target for speed


class Subject(NamedTuple):
    """Tensors, and the peers' name for their format."""

    kind: str
    tensors: Callable[[], dict[str, Tensor]]


def codes_of(name: str) -> dict[str, Tensor]:
    return {key: torch.from_numpy(array) for key, array in codes.load(name).items()}


def floats_of(kind: str, whole: bool) -> dict[str, Tensor]:
    tensors = codes.minilm() if whole else codes.minilm_weights()
    return {name: w.to(codes.FLOATS[kind]).contiguous() for name, w in tensors.items()}


SUBJECTS = {
    **{
        name: Subject(kind, lambda name=name: codes_of(name))
        for name, kind in zip(codes.SETS, ("int8", "int4", "indices", "indices"), strict=True)
    },
    **{f"minilm_{kind}": Subject(kind, lambda kind=kind: floats_of(kind, False)) for kind in codes.FLOATS},
    **{f"whole_{kind}": Subject(kind, lambda kind=kind: floats_of(kind, True)) for kind in codes.FLOATS},
}


class Took(NamedTuple):
    """Seconds of one decoding: wall-clock, and CPU time of all cores."""

    wall: float
    cpu: float


class Peers:
    """The process with the peers: their results on the tensors, and one decoding at a time."""

    def __init__(self, python: str, tensors: dict[str, Tensor], kind: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "tensors.npz"
            np.savez(path, **{str(n): as_numbers(array) for n, array in enumerate(tensors.values())})
            command = [python, str(HERE / "peers.py"), str(path), kind]
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            self.said: dict[str, dict[str, Any]] = self.answer()
        self.ready = [name for name, facts in self.said.items() if "nbytes" in facts]
        self.encoders = [name for name in self.ready if self.said[name]["encodes"]]

    def answer(self) -> Any:
        found = self.process.stdout.readline()
        if not found:
            raise TersorError(
                f"bench: {' '.join(self.process.args)} ended before it answered. Run it by hand"
            )
        return json.loads(found)

    def time(self, job: str) -> Took:
        """Seconds of a job: the name of a peer to decode, or "encode PEER"."""
        self.process.stdin.write(f"{job}\n")
        self.process.stdin.flush()
        return Took(**self.answer())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def as_numbers(array: Tensor) -> np.ndarray:
    """Floats as bytes, since numpy has no bfloat16."""
    return array.view(torch.uint8).numpy() if array.is_floating_point() else array.numpy()


def measure(name: str, python: str, rounds: int) -> Iterator[Row]:
    subject = SUBJECTS[name]
    tensors = subject.tensors()
    leaves = {profile: [coded(array, coder=profile) for array in tensors.values()] for profile in PROFILES}
    for streams in leaves.values():
        proved(streams, tensors)
    peers = Peers(python, tensors, subject.kind)
    try:
        took = turns(leaves, peers, rounds)
        best = min(PROFILES, key=lambda profile: sum(leaf.nbytes for leaf in leaves[profile]))
        encoding = encoding_turns(tensors, best, peers, rounds) if peers.encoders else {}
    finally:
        peers.close()
    sizes = {profile: sum(leaf.nbytes for leaf in streams) for profile, streams in leaves.items()}
    sizes |= {peer: peers.said[peer]["nbytes"] for peer in peers.ready}
    yield from size_rows(name, tensors, sizes)
    yield from speed_rows(name, tensors, sizes, took)
    yield from encoding_rows(name, tensors, encoding)
    for peer, facts in peers.said.items():
        if "missing" in facts:
            print(f"{name:14} {peer}: {facts['missing']}")


def proved(leaves: list[Coded], tensors: dict[str, Tensor]) -> None:
    for leaf, (name, array) in zip(leaves, tensors.items(), strict=True):
        if not torch.equal(leaf.decode().view(torch.uint8), array.view(torch.uint8)):
            raise ValueError(f"{name}: what was decoded is not what was given")


def turns(leaves: dict[str, list[Coded]], peers: Peers, rounds: int) -> dict[str, list[Took]]:
    """Seconds of decoding all tensors, for each round."""
    took: dict[str, list[Took]] = {name: [] for name in (*leaves, *peers.ready)}
    for _ in range(rounds):
        for profile, streams in leaves.items():
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in in_order(streams, lambda leaf: leaf.nbytes, lambda leaf: leaf, decoded):
                pass
            took[profile].append(Took(time.perf_counter() - wall, time.process_time() - cpu))
        for peer in peers.ready:
            took[peer].append(peers.time(peer))
    return took


def encoding_turns(
    tensors: dict[str, Tensor], profile: str, peers: Peers, rounds: int
) -> dict[str, list[Took]]:
    """Seconds of encoding all tensors in memory, for each round: Tersor like `pack`, on all cores."""

    def encoded(array: Tensor, _: Tensor) -> int:
        return coded(array, coder=profile).nbytes

    took: dict[str, list[Took]] = {name: [] for name in (OURS, *peers.encoders)}
    for _ in range(rounds):
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in in_order(tensors.values(), lambda array: array.nbytes, lambda array: array, encoded):
            pass
        took[OURS].append(Took(time.perf_counter() - wall, time.process_time() - cpu))
        for peer in peers.encoders:
            took[peer].append(peers.time(f"encode {peer}"))
    return took


def decoded(leaf: Coded, _: Coded) -> Tensor:
    return leaf.decode()


def size_rows(name: str, tensors: dict[str, Tensor], sizes: dict[str, int]) -> Iterator[Row]:
    weights = sum(array.numel() for array in tensors.values())
    whole = file_bytes(tensors)
    best = min(sizes[profile] for profile in PROFILES)
    note = f"{weights} weights; a .tersor file of them: {8 * whole / weights:.4f}"
    if SUBJECTS[name].kind in codes.FLOATS:
        given = sum(array.nbytes for array in tensors.values())
        yield row(name, "size, Tersor", 100 * best / given, "%", note=f"file: {100 * whole / given:.3f} %")
        for peer in set(sizes) - set(PROFILES):
            yield row(name, f"size, {peer}", 100 * sizes[peer] / given, "%")
        if "zipnn" in sizes:
            yield row(name, "bytes over zipnn's", 100 * (best / sizes["zipnn"] - 1), "%", "<= 0")
        return

    def per_weight(nbytes: float) -> str:
        return f"{8 * nbytes / weights:.4f}"  # a target must not be met by rounding

    bound = sum(order0_bits(as_numbers(array).view(np.uint8)) for array in tensors.values())
    yield row(name, "order-0 entropy", per_weight(bound / 8), "b/w")
    target = f"<= {MOST[name]}"
    yield row(name, "size, Tersor", per_weight(best), "b/w", target, note=note)
    for other in sorted(sizes):
        yield row(name, f"size, {other}", per_weight(sizes[other]), "b/w")
    if name in DENSE:
        over = 100 * (8 * sizes["fast"] / bound - 1)
        yield row(name, "fast, over the order-0 entropy", over, "%", "<= 0.5")
        if "nncodec" in sizes:
            over = 100 * (sizes["max"] / sizes["nncodec"] - 1)
            yield row(name, "max, bytes over nncodec's", over, "%", "<= 0")


def speed_rows(
    name: str, tensors: dict[str, Tensor], sizes: dict[str, int], took: dict[str, list[Took]]
) -> Iterator[Row]:
    """Decoding speeds, and the ratios that are targets."""
    nbytes = sum(array.nbytes for array in tensors.values())
    cores = len(os.sched_getaffinity(0))
    for who, seconds in took.items():
        target = ">= 500" if who == "fast" and name in DENSE else ""
        wall, cpu = (nbytes / statistics.median(each) / 1e6 for each in zip(*seconds, strict=True))
        where = f"{cores} cores; " if who in PROFILES else ""
        note = f"{where}{cpu:.4g} MB/s a core by CPU time"
        yield row(name, f"decode, {who}", wall, "MB/s", target, note=note)
    if name in DENSE and "nncodec" in took:
        yield row(name, "decode, max, times nncodec's speed", ratio(took, "nncodec", "max"), "x", ">= 5")
    if SUBJECTS[name].kind in codes.FLOATS and "zipnn" in took:
        best = min(PROFILES, key=lambda profile: sizes[profile])
        yield row(
            name,
            "decode, times zipnn's speed",
            ratio(took, "zipnn", best),
            "x",
            ">= 0.5",
            note=f"{cores} cores",
        )


def encoding_rows(name: str, tensors: dict[str, Tensor], took: dict[str, list[Took]]) -> Iterator[Row]:
    """Encoding speeds, and the ratio that is a target."""
    nbytes = sum(array.nbytes for array in tensors.values())
    cores = f"{len(os.sched_getaffinity(0))} cores"
    for who, seconds in took.items():
        wall, cpu = (nbytes / statistics.median(each) / 1e6 for each in zip(*seconds, strict=True))
        yield row(name, f"encode, {who}", wall, "MB/s", note=f"{cores}; {cpu:.4g} MB/s a core by CPU time")
    if "zipnn" in took:
        yield row(name, "encode, times zipnn's speed", ratio(took, "zipnn", OURS), "x", ">= 0.8", note=cores)


def ratio(took: dict[str, list[Took]], other: str, ours: str) -> float:
    """How many times as fast Tersor is: the median of the rounds' ratios."""
    return statistics.median(a.wall / b.wall for a, b in zip(took[other], took[ours], strict=True))


def file_bytes(tensors: dict[str, Tensor]) -> int:
    """A .tersor file of the tensors, everything included."""
    with tempfile.TemporaryDirectory() as folder:
        given, out = Path(folder) / "given.safetensors", Path(folder) / "packed.tersor"
        save_file(tensors, given)
        tersor.pack(given, out, Recipe((Entropy(),)))
        return out.stat().st_size


def row(name: str, what: str, value: float | str, unit: str, target: str = "", *, note: str = "") -> Row:
    return Row("bytes", name, what, value, unit, target, note=note)


def main(argv: list[str] | None = None) -> int:
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--peers", metavar="PYTHON", default=os.environ.get("TERSOR_PEERS", sys.executable))
    own.add_argument("--rounds", type=int, default=ROUNDS, help="decodings; their median counts")
    options, _ = own.parse_known_args(argv)
    return job.main(
        __doc__, lambda name: measure(name, options.peers, options.rounds), tuple(SUBJECTS), argv, (own,)
    )


if __name__ == "__main__":
    sys.exit(main())
