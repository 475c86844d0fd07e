"""Rounding: the smallest files without training, with codes chosen by bits and by error of the output.

lenet300, lenet5   the smallest file that loses at most 0.1 point, by Tersor's own search on the test images
minilm             all weights, embeddings too, at two sizes: mean cosine to fp32 on 500 held-out sentences
Sizes are those of whole files; the scored weights are read back from them. nncodec, the MPEG reference, needs
75.0 and 205.9 kB for the first two at its best rate, and 12.4 MB at 0.987 and 18.1 MB at 0.999 for MiniLM.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import minilm
from job import lost, main, read_back
from networks import load, task
from table import Row

from tersor.core.run import run
from tersor.io import load as load_file
from tersor.io import save
from tersor.steps import Entropy, Rdoq

CALIBRATE, PASSES = 60_000, 1  # training images: all of them, and passes over them
MOST = {"lenet300": 52.0, "lenet5": 144.0}  # kB
# Bits a weight, target of the mean cosine, and MB allowed.
POINTS = ((2.35, 0.98, 9.5), (4.5, 0.999, 16.0))


def measure(name: str) -> Iterator[Row]:
    yield from sentence_encoder() if name == "minilm" else classifier(name)


def classifier(name: str) -> Iterator[Row]:
    net, on = load(name), task(calibrate=CALIBRATE)
    began = time.perf_counter()
    result = run(net, [Rdoq(max_drop=0.1, passes=PASSES), Entropy()], on)
    seconds = time.perf_counter() - began
    model, nbytes = read_back(result, name)
    fall, note = lost(on.scores(net), on.scores(model))
    yield Row("rounding", name, "drop", round(fall.amount, 2), "points", "<= 0.1", note=note)
    short = read_back(result, name, tiny=True)[1]
    note = f"not trained; {short} bytes with a short header; {seconds:.0f} s"
    yield Row("rounding", name, "file", nbytes / 1000, "kB", f"<= {MOST[name]:g}", note=note)


def sentence_encoder() -> Iterator[Row]:
    net = minilm.load()
    on = minilm.task(net)
    for bits, cosine, megabytes in POINTS:
        began = time.perf_counter()
        result = run(net, [Rdoq(bits=bits), Entropy()], on)
        seconds = time.perf_counter() - began
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "minilm.tersor"
            nbytes = save(result, path)
            scores = on.scores(load_file(path).model(net))
        note = f"lowest of 500 {float(scores.min()):.3f}"
        what = f"at {cosine:g}"
        yield Row(
            "rounding",
            "minilm",
            f"{what}, mean cosine",
            float(scores.mean()),
            "",
            f">= {cosine:g}",
            note=note,
        )
        note = f"all weights, not trained; {seconds:.0f} s"
        yield Row("rounding", "minilm", f"{what}, file", nbytes / 1e6, "MB", f"<= {megabytes:g}", note=note)


if __name__ == "__main__":
    sys.exit(main(__doc__, measure, (*MOST, "minilm")))
