"""Slim latency: ONNX files timed side by side, in ONNX Runtime and OpenVINO, with one thread.

PYTHON bench/slim_latency.py [--rounds 40] NAME=FILE.onnx ...        the first one is the unpruned network
One line of JSON for each runtime, batch and file: {"name", "runtime", "batch", "ms", "ratio"}. In each round
every file runs for some milliseconds, one after the other, forwards or backwards in turn. `ms` is the median
of the rounds, `ratio` the median of the rounds' ratios: how many times as fast as the first. OpenVINO runs in
float32, as ONNX Runtime does; left alone it takes bfloat16 where the processor has it. All outputs are
compared: a runtime that differs from ONNX Runtime is an error. It needs numpy, onnxruntime, openvino.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np

Call = Callable[[np.ndarray], np.ndarray]
ROUNDS = 40
BURSTS = {1: 0.004, 64: 0.02}  # batch -> seconds of a file in one round
WARM = 5  # calls: the first ones allocate
APART = 1e-3  # of two runtimes' outputs, relative to the largest


def onnx_runtime(path: str) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})[0]


def openvino(path: str, precision: str = "f32") -> Call:
    """`precision` "": what OpenVINO takes by itself, bfloat16 where the processor has it."""
    import openvino as ov

    settings: dict[str, object] = {
        "INFERENCE_NUM_THREADS": 1,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    if precision:
        settings["INFERENCE_PRECISION_HINT"] = precision
    request = ov.Core().compile_model(path, "CPU", settings).create_infer_request()
    return lambda x: request.infer({0: x}, share_inputs=True)[0]


RUNTIMES: dict[str, Callable[[str], Call]] = {"ONNX Runtime": onnx_runtime, "OpenVINO": openvino}


def timed(calls: dict[str, Call], x: np.ndarray, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of one call, for each round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    repeats = {}
    for name, call in calls.items():
        for _ in range(WARM):
            call(x)
        repeats[name] = max(1, round(BURSTS[len(x)] / burst(call, x, 3)))
    for number in range(rounds):
        for name in list(calls)[:: -1 if number % 2 else 1]:
            times[name].append(1000 * burst(calls[name], x, repeats[name]))
    return times


def burst(call: Call, x: np.ndarray, repeats: int) -> float:
    """Seconds of one call, from several."""
    began = time.perf_counter()
    for _ in range(repeats):
        call(x)
    return (time.perf_counter() - began) / repeats


def ratio(times: list[float], first: list[float]) -> float:
    """How many times as fast as the first: the median of the rounds' ratios."""
    return statistics.median(other / mine for mine, other in zip(times, first, strict=True))


def same(name: str, found: np.ndarray, wanted: np.ndarray) -> None:
    apart = float(np.abs(found - wanted).max() / np.abs(wanted).max())
    if not apart < APART:
        raise ValueError(f"{name}: two runtimes differ by {apart:.2g} of the largest output")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="+", metavar="NAME=FILE", help="the first one is the unpruned network")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args(argv)
    files = dict(word.rsplit("=", 1) for word in options.files)
    drawn = np.random.default_rng(0)
    inputs = {size: drawn.standard_normal((size, 1, 28, 28)).astype(np.float32) for size in BURSTS}
    wanted: dict[str, np.ndarray] = {}
    for runtime, load in RUNTIMES.items():
        try:
            calls = {name: load(path) for name, path in files.items()}
        except ImportError as error:
            print(json.dumps({"runtime": runtime, "missing": f"not installed: {error}"}), flush=True)
            continue
        for name, call in calls.items():
            same(f"{name}, {runtime}", call(inputs[64]), wanted.setdefault(name, call(inputs[64])))
        for size, x in inputs.items():
            times = timed(calls, x, options.rounds)
            for name in calls:
                found = {
                    "name": name, "runtime": runtime, "batch": size, "ms": statistics.median(times[name]),
                    "ratio": ratio(times[name], next(iter(times.values()))),
                }  # fmt: skip
                print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
