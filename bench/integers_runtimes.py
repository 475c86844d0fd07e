"""Integers runtimes: what .onnx and .xml files answer, and how fast, in ONNX Runtime and OpenVINO.

PYTHON bench/integers_runtimes.py IMAGES.npy FOLDER [--rounds 40] NAME=FILE ...      --rounds 0: outputs alone
The first file is the float network's. All run with one thread. Lines of JSON, for each runtime:
    {"runtime", "name", "outputs"}          a file's outputs for all images, .npy [N, classes] in FOLDER
    {"runtime", "name", "failed"}           why a file does not run
    {"runtime", "batch", "load", "times"}   ms a call, for each file and round; a round has all in turn
    {"runtime", "missing"}
The float file is opened a second time, as an A/A check, and in OpenVINO a third time in the precision that it
takes by itself, bfloat16 where the processor has it; all others run in float32 where they are no integers.
It needs numpy, scipy, onnxruntime, openvino.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
if str(HERE.parent / "src") not in sys.path:
    sys.path.append(str(HERE.parent / "src"))  # tersor.measure.latency needs scipy, nothing else

from child import answer  # noqa: E402
from slim_latency import RUNTIMES, Call, openvino  # noqa: E402

from tersor.measure.latency import interleave  # noqa: E402

AGAIN, ITSELF = "float again", "float, OpenVINO's own choice"
BURSTS = {1: 4.0, 64: 20.0}  # batch -> ms of a file in one round
ROUNDS = 40
SCORED = 100  # images a call


def outputs(call: Call, images: np.ndarray) -> np.ndarray:
    """The outputs for all images, [N, ...]. A runtime may use its buffers again, hence the copies."""
    starts = range(0, len(images), SCORED)
    return np.concatenate([call(images[at : at + SCORED]).copy() for at in starts])


def opened(runtime: str, files: dict[str, str]) -> dict[str, Call | str]:
    """The files' calls, or in a word why there is none. ImportError if the runtime is not installed."""
    first = next(iter(files))
    found: dict[str, Call | str] = {}
    for name, path in {first: files[first], AGAIN: files[first], **files}.items():
        if runtime != "OpenVINO" and Path(path).suffix == ".xml":
            continue  # a file of OpenVINO
        try:
            found[name] = RUNTIMES[runtime](path)
        except ImportError:
            raise
        except Exception as error:  # each runtime has its own errors, and one file may not end the others
            found[name] = f"{type(error).__name__}: {error}"[:300]
    if runtime == "OpenVINO":
        found[ITSELF] = openvino(files[first], precision="")
    return found


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("images", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("files", nargs="+", metavar="NAME=FILE", help="the first one is the float network")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args(argv)
    files = dict(word.split("=", 1) for word in options.files)
    images, lines = np.load(options.images), answer()

    def say(**line: object) -> None:
        lines.write(json.dumps(line) + "\n")

    for runtime in RUNTIMES:
        try:
            calls = opened(runtime, files)
        except ImportError as error:
            say(runtime=runtime, missing=f"not installed: {error}")
            continue
        runs: dict[str, Call] = {}
        for name, call in calls.items():
            if isinstance(call, str):
                say(runtime=runtime, name=name, failed=call)
                continue
            path = options.out / f"{runtime}-{len(runs)}.npy".replace(" ", "-")
            np.save(path, outputs(call, images))
            runs[name] = call
            say(runtime=runtime, name=name, outputs=str(path))
        for batch, burst in BURSTS.items() if options.rounds else ():
            x = np.ascontiguousarray(images[:batch])
            turns = {name: partial(call, x) for name, call in runs.items()}
            times = interleave(turns, rounds=options.rounds, burst_ms=burst)
            each = {name: timing.rounds for name, timing in times.items()}
            say(runtime=runtime, batch=batch, load=round(os.getloadavg()[0], 1), times=each)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
