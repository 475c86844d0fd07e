"""Factors: convolutions as two to four smaller ones, by five products, at half the MACs or half the size.

Each of SVD, Tucker-2, CP, spatial and tensor-train factors (factorize layers=true keep=0.5): accuracy on all
test images before tuning, with one budget for all layers and with the same share for each; for SVD and Tucker
also of the weight alone, not weighed by its inputs. At half the MACs also after EPOCHS epochs with the
network as its own teacher, with the parameters and the time in ONNX Runtime on one thread, both in turn. The
scored weights are read back from the file.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from job import lost, main, read_back, speed
from networks import load, parameters, percent, task
from table import Row

from tersor.core.run import run
from tersor.steps import Distill, Factorize, Measure

EPOCHS, RATE, CALIBRATE = 0.3, 0.002, 1000
METHODS = ("svd", "tucker", "cp", "spatial", "tt")
WAYS = {
    **{f"{method}, half the MACs": {"method": method, "of": "macs"} for method in METHODS},
    **{f"{method}, half the parameters": {"method": method} for method in METHODS},
    **{f"{method}, half of each layer": {"method": method, "per": "tensor"} for method in METHODS},
    **{f"plain {method}, half the parameters": {"method": method, "whiten": False} for method in METHODS[:2]},
}
TUNED = "half the MACs"


def measure(name: str) -> Iterator[Row]:
    net, on = load(name), task(calibrate=CALIBRATE)
    given = on.scores(net)
    yield row(name, "fp32, accuracy", percent(given), "%")
    for way, settings in WAYS.items():
        cut = run(net, Factorize(keep=0.5, layers=True, **settings), on)
        model, _ = read_back(cut, name)
        yield row(name, f"{way}, not tuned, accuracy", percent(on.scores(model)), "%")
        if not way.endswith(TUNED):
            continue
        share = 100 * parameters(model) / parameters(net)
        yield row(name, f"{way}, share of the parameters", round(share, 1), "%")
        tuned = run(cut, [Distill(epochs=EPOCHS, lr=RATE), Measure(latency=True)], on)
        fall, note = lost(given, on.scores(read_back(tuned, name)[0]))
        yield row(name, f"{way}, {EPOCHS:g} epochs, drop", round(fall.amount, 2), "points", note=note)
        times, note = speed(tuned)
        yield row(name, f"{way}, times as fast, ONNX Runtime, batch 1", round(times, 2), "x", note=note)


def row(name: str, what: str, value: float, unit: str, *, note: str = "") -> Row:
    return Row("factors", name, what, value, unit, note=note)


if __name__ == "__main__":
    sys.exit(main(__doc__, measure, ("resnet20", "vgg")))
