"""Rounding: the smallest files without training, with codes chosen by bits and by error of the output.

lenet300, lenet5   a file of a given size, and the smallest one that loses at most 0.1 points of the training
                   images (rdoq max_drop), both judged once on the test images; and the latter again
minilm             all weights, embeddings too, at two sizes: mean cosine to fp32 on 500 held-out sentences
Sizes are those of whole files; the scored weights are read back from them. nncodec, the MPEG reference, needs
75.0 and 205.9 kB for the first two at its best rate, and 12.4 MB at 0.987 and 18.1 MB at 0.999 for MiniLM.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import minilm
import torch
from job import lost, main, read_back
from networks import load, task
from table import Row
from torch import nn

from tersor.core.run import run
from tersor.io.container import load as load_file
from tersor.io.container_writer import save
from tersor.steps import Entropy, Rdoq

CALIBRATE, PASSES = 10_000, 1  # training images for the curvature, and passes over them; all of them decide
MOST = {"lenet300": 52.0, "lenet5": 144.0}  # kB
PEER = {"lenet300": 75.0, "lenet5": 205.9}  # kB: nncodec's
HEADER = 2500  # bytes of a file's ledger at most, for these networks
# Bits a weight, target of the mean cosine, and MB allowed.
POINTS = ((2.35, 0.98, 9.5), (4.5, 0.999, 16.0))


def measure(name: str) -> Iterator[Row]:
    yield from sentence_encoder() if name == "minilm" else classifier(name)


def classifier(name: str) -> Iterator[Row]:
    """At a size that is set beforehand, and at a drop that the training images decide. The test images, which
    decide nothing, judge both once."""
    net, on = load(name), task(calibrate=CALIBRATE)
    scores = on.scores(net)
    for what, step, most in (
        (f"at {MOST[name]:g} kB", Rdoq(nbytes=int(1000 * MOST[name]) - HEADER, passes=PASSES), MOST[name]),
        ("at a drop of 0.1", Rdoq(max_drop=0.1, passes=PASSES), PEER[name]),
    ):
        began = time.perf_counter()
        result = run(net, [step, Entropy()], on)
        seconds = time.perf_counter() - began
        model, nbytes = read_back(result, name)
        fall, note = lost(scores, on.scores(model))
        yield Row("rounding", name, f"{what}, drop", round(fall.amount, 2), "points", "<= 0.1", note=note)
        short = read_back(result, name, tiny=True)[1]
        note = f"not trained; {short} bytes with a short header; {seconds:.0f} s"
        yield Row("rounding", name, f"{what}, file", nbytes / 1000, "kB", f"<= {most:g}", note=note)
    again = read_back(run(moved(net), [step, Entropy()], on), name)[1]
    note = "weights changed by 1e-6, as much as sums in another order change the statistics"
    apart = 100 * abs(again / nbytes - 1)
    yield Row("rounding", name, f"{what}, file again", round(apart, 2), "% apart", "<= 2", note=note)


def moved(net: nn.Module) -> nn.Module:
    """The network with other last bits, as another machine's sums would have them."""
    net, generator = copy.deepcopy(net), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in net.parameters():
            weight.mul_(1 + 1e-6 * torch.randn(weight.shape, generator=generator))
    return net


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
