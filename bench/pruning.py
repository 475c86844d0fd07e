"""Pruning: single weights set to zero at once, without training and without labels.

lenet300, lenet5, resnet20, mobilenetv2   the shares of SHARES kept: accuracy on all test images by `prune` as
it is, by LAMP scores alone (correct=false), and by PyTorch's own global_unstructured and l1_unstructured
300 training images calibrate; their labels are not read.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Iterator

from job import main
from networks import load, task
from table import Row
from torch import nn
from torch.nn.utils import prune

from tersor.core.run import run
from tersor.steps import Prune

CALIBRATE = 300
SHARES = {
    "lenet300": (0.1, 0.05),
    "lenet5": (0.2, 0.1, 0.05),
    "resnet20": (0.3, 0.15, 0.08),
    "mobilenetv2": (0.5, 0.3),
}


def measure(name: str) -> Iterator[Row]:
    net, on = load(name), task(calibrate=CALIBRATE)

    def accuracy(model: nn.Module) -> float:
        return round(100 * float(on.scores(model).float().mean()), 2)

    yield Row("pruning", name, "given, accuracy", accuracy(net), "%")
    for share in SHARES[name]:
        begin = time.process_time()
        result = run(net, [Prune(keep=share)], on).model()
        seconds = time.process_time() - begin
        yield Row("pruning", name, f"keep={share:g}, accuracy", accuracy(result), "%")
        yield Row("pruning", name, f"keep={share:g}, time", round(seconds, 1), "s")
        plain = run(net, [Prune(keep=share, correct=False)], on).model()
        yield Row("pruning", name, f"keep={share:g} correct=false, accuracy", accuracy(plain), "%")
        for word in ("global", "each layer"):
            yield Row("pruning", name, f"PyTorch, {share:g} kept, {word}, accuracy",
                      accuracy(by_torch(net, share, word)), "%")  # fmt: skip


def by_torch(net: nn.Module, share: float, word: str) -> nn.Module:
    """What torch.nn.utils.prune makes of it: the largest weights kept, of all layers or of each."""
    model = copy.deepcopy(net)
    layers = [(m, "weight") for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    if word == "global":
        prune.global_unstructured(layers, prune.L1Unstructured, amount=1 - share)
    else:
        for module, _ in layers:
            prune.l1_unstructured(module, "weight", amount=1 - share)
    return model


if __name__ == "__main__":
    sys.exit(main(__doc__, measure, tuple(SHARES)))
