"""Peers: bytes and seconds of other coders, in an interpreter that has them; bench/bytes.py starts it.

PYTHON bench/peers.py FILE.npz FORMAT          FORMAT: int8, int4 or indices (codes), bf16, fp16 or fp32
First a line of JSON: {peer: {"nbytes", "seconds" of encoding} or {"missing": why}}. Then for each name of a
peer on stdin it decodes once, and for "encode NAME" encodes once, and prints {"wall", "cpu"} in seconds. It
needs numpy; a peer that cannot be imported is missing. Every peer's decoded result is compared with its input
before its figures count.

zstd-3        all tensors behind each other; int4 two to a byte, floats as they are
zipnn         the same bytes; decodes in one thread, encodes on all cores; floats only
constriction  ANS, one static model a tensor, whose table counts 2 bytes a symbol
nncodec       its entropy coder on integers (int32, as it requires), one stream for all tensors
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Arrays = dict[str, np.ndarray]
FLOATS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}  # in zipnn's words
TABLE = 2  # bytes a symbol


class Prepared(NamedTuple):
    """A peer's encoding of the arrays, its decoder, and its encoder where that is timed."""

    nbytes: int
    decode: Callable[[], Any]
    same: Callable[[Any], bool]
    encode: Callable[[], Any] | None = None


def plain(arrays: Arrays, kind: str) -> bytes:
    """All tensors as bytes, as few as possible without a coder."""
    flat = np.concatenate([array.reshape(-1).view(np.uint8) for array in arrays.values()])
    if kind != "int4":
        return flat.tobytes()
    nibbles = np.append(flat + 8, np.zeros(len(flat) % 2, np.uint8)) & 15
    return (nibbles[::2] | nibbles[1::2] << 4).astype(np.uint8).tobytes()


def zstd(arrays: Arrays, kind: str) -> Prepared:
    module = importlib.import_module("zstandard")
    raw = plain(arrays, kind)
    data = module.ZstdCompressor(level=3).compress(raw)
    return Prepared(len(data), lambda: module.ZstdDecompressor().decompress(data), lambda found: found == raw)


def zipnn(arrays: Arrays, kind: str) -> Prepared | None:
    module = importlib.import_module("zipnn")
    if kind not in FLOATS:
        return None
    raw = plain(arrays, kind)
    coder = module.ZipNN(bytearray_dtype=FLOATS[kind], input_format="byte", threads=1)
    data = coder.compress(bytearray(raw))
    every = module.ZipNN(bytearray_dtype=FLOATS[kind], input_format="byte", threads=os.cpu_count() or 1)
    fresh = bytearray(raw)  # compress() may write to what it is given; the copy is no part of its time

    def encode() -> int:
        return len(every.compress(fresh))

    return Prepared(len(data), lambda: coder.decompress(data), lambda found: bytes(found) == raw, encode)


def constriction(arrays: Arrays, kind: str) -> Prepared | None:
    stream = importlib.import_module("constriction").stream
    if kind in FLOATS:
        return None
    streams, nbytes = [], 0
    for array in arrays.values():
        flat = array.reshape(-1).astype(np.int32)
        symbols = flat - flat.min()
        counts = np.bincount(symbols).astype(np.float64)
        model = stream.model.Categorical(counts / counts.sum(), perfect=False)
        coder = stream.stack.AnsCoder()
        coder.encode_reverse(symbols, model)
        words = coder.get_compressed()
        nbytes += words.nbytes + TABLE * len(counts)
        streams.append((words, model, len(flat), flat.min()))

    def decode() -> list[np.ndarray]:
        return [
            stream.stack.AnsCoder(words).decode(model, count) + low for words, model, count, low in streams
        ]

    return Prepared(nbytes, decode, lambda found: equal(found, list(arrays.values())))


def nncodec(arrays: Arrays, kind: str) -> Prepared | None:
    module = importlib.import_module("nncodec.nnc")
    if kind in FLOATS:
        return None
    given = {f"t{n}.weight": array.astype(np.int32) for n, array in enumerate(arrays.values())}
    data = module.compress(given, bitstream_path=None, return_bitstream=True)
    return Prepared(
        len(data),
        lambda: module.decompress(bytearray(data)),
        lambda found: equal([found[name] for name in given], list(given.values())),
    )


def equal(found: list[np.ndarray], given: list[np.ndarray]) -> bool:
    return all(
        np.array_equal(np.asarray(one).reshape(-1), other.reshape(-1))
        for one, other in zip(found, given, strict=True)
    )


PEERS: dict[str, Callable[[Arrays, str], Prepared | None]] = {
    "zstd-3": zstd,
    "zipnn": zipnn,
    "constriction": constriction,
    "nncodec": nncodec,
}


def prepare(arrays: Arrays, kind: str) -> tuple[dict[str, Prepared], dict[str, dict[str, Any]]]:
    """The peers that can decode, and the report on all peers that support this kind."""
    ready: dict[str, Prepared] = {}
    reports: dict[str, dict[str, Any]] = {}
    for name, make in PEERS.items():
        began = time.perf_counter()
        try:
            peer = make(arrays, kind)
        except ImportError as error:
            reports[name] = {"missing": f"not installed: {error}"}
            continue
        if peer is None:
            continue
        took = time.perf_counter() - began
        if not peer.same(peer.decode()):
            reports[name] = {"missing": "it did not return what it was given"}
            continue
        ready[name] = peer
        reports[name] = {"nbytes": peer.nbytes, "seconds": took, "encodes": peer.encode is not None}
    return ready, reports


def timed(call: Callable[[], Any]) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def main(argv: list[str]) -> int:
    path, kind = argv
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of a peer, from C too, must not mix with the results

    def answer(document: Any) -> None:
        answers.write(json.dumps(document) + "\n")
        answers.flush()

    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    ready, reports = prepare(arrays, kind)
    answer(reports)
    for line in sys.stdin:
        *verb, name = line.split()
        answer(timed(ready[name].encode if verb else ready[name].decode))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
