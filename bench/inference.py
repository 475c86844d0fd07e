"""Inference: memory and processor time of one .onnx file in a runtime, in a process of its own.

python bench/inference.py RUNTIME FILE     one line of JSON
megabytes   the peak of resident memory while the file is opened and run, above that just before; the kernel's
            mark is reset there. None where the kernel does not let a process reset it
seconds     of processor time a thousand calls, batch 1, one thread: median of ROUNDS, and its 95 % interval
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
from child import MB, answer, peak

from tersor.maths.statistics import median_interval
from tersor.runtimes import runtime

ROUNDS, CALLS = 10, 100
SHAPE = (1, 1, 28, 28)
STATUS, REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5)


def main(name: str, path: str) -> None:
    stream, of = answer(), runtime(name)
    image = np.random.default_rng(0).standard_normal(SHAPE, dtype=np.float32)
    before = reset()
    session = of.open(path, threads=1)
    session.run(image)
    seconds = []
    for _ in range(ROUNDS):
        began = time.process_time()
        for _ in range(CALLS):
            session.run(image)
        seconds.append((time.process_time() - began) * 1000 / CALLS)
    grown = None if before is None else round(peak() - before, 2)
    print(
        json.dumps({"megabytes": grown, "seconds": [median(seconds), *median_interval(seconds)]}), file=stream
    )


def reset() -> float | None:
    """Reset the kernel's mark of the peak; the resident memory now, in MB."""
    try:
        REFERENCES.write_text(RESET_PEAK)
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / MB


if __name__ == "__main__":
    main(*sys.argv[1:])
