"""Tables peer: NNCF's int8 file of a float network of the zoo, beside ours of the cut network.

float.onnx, the task's calibration images -> NNCF -> peer.onnx           not trained and not cut
peer.onnx beside float.onnx: its drop; beside our file: times in ONNX Runtime and OpenVINO, in turn
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from integers import peer_file
from rows_file import Row

from tersor.resolve import task_of

METHOD = "nncf-onnx-mixed"
PEERS = os.environ.get("TERSOR_INTEGER_PEERS", "")  # interpreter
RUNTIMES = ("onnxruntime", "openvino")


def beside(given: Path, ours: Path, task: str, out: Path, compared: Callable[..., Row]) -> Row | None:
    """The peer's file of the float file `given`, and ours beside it; None if PEERS has no NNCF, or if
    a runtime does not run its file: so it is with deeplab_v3plus in ONNX Runtime 1.32.

    `compared(file, file, task, runtime)`: what `tersor compare` says of two files.
    """
    out.mkdir(parents=True, exist_ok=True)
    images = out / "images.npy"
    calibrate = task_of(task).calibrate
    np.save(images, np.concatenate([batch[0].numpy() for batch in calibrate]))
    made = peer_file(PEERS, METHOD, given, images, out)
    images.unlink()
    if made is None:
        return None
    file = Path(made.path)
    try:
        return {
            "method": METHOD, "bytes": made.nbytes, "accuracy": compared(given, file, task)["accuracy"],
            "latency": {runtime: compared(file, ours, task, runtime)["latency"] for runtime in RUNTIMES},
        }  # fmt: skip
    except subprocess.CalledProcessError:  # it has printed why
        print(f"tables: {METHOD} made {file.name}, which does not run", file=sys.stderr, flush=True)
        return None
