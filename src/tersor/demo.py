"""Demo: the whole pipeline on real data: train a small conv net, compress, measure, unpack, compare.

data    1,797 images of handwritten digits inside scikit-learn: 1,000 to train, 797 to evaluate
recipe  recipes/demo.yaml, with the same calls as `tersor run`; every number is measured in this run
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tersor.core.run import run
from tersor.core.state import State, start
from tersor.errors import RefusedError
from tersor.files import output, write_text
from tersor.io.container import load
from tersor.io.unpack import unpack
from tersor.model.batches import seeded
from tersor.model.builtin_tasks import digits
from tersor.model.task import Task
from tersor.pipeline import MODEL, REPORT, run_pipeline, write_plain
from tersor.record.observer import Observer
from tersor.report.console import percent, to_json, whole
from tersor.report.table import report as tables
from tersor.resolve import put_in
from tersor.steps import Finetune, read_recipe

if TYPE_CHECKING:
    from rich.console import RenderableType

RECIPE = Path(__file__).parent / "recipes" / "demo.yaml"
EPOCHS = 20  # of the training of the given network
GIVEN, UNPACKED = "given.safetensors", "unpacked.safetensors"


def net() -> nn.Module:
    """A plain conv net for images of 8 x 8: 90,000 parameters, the same ones each time."""
    with seeded(0):
        return nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(1, 32, 3, padding=1), relu1=nn.ReLU(),
                conv2=nn.Conv2d(32, 64, 3, padding=1), relu2=nn.ReLU(), pool2=nn.MaxPool2d(2),
                conv3=nn.Conv2d(64, 64, 3, padding=1), relu3=nn.ReLU(), pool3=nn.MaxPool2d(2),
                flat=nn.Flatten(), fc1=nn.Linear(256, 128), relu4=nn.ReLU(), fc2=nn.Linear(128, 10),
            )
        )  # fmt: skip


def demo(out: Path, observer: Observer | None = None) -> dict[str, Any]:
    """Run the demo. Returns the facts of the run, with those of the unpacked weights."""
    output(out / GIVEN)  # an impossible folder is an error before the training
    observer, task, recipe = observer or Observer(), digits(), read_recipe(RECIPE)
    # More threads make a net this small no faster, and much slower if other programs use the cores.
    with one_thread():
        given = trained(task, observer)
        write_plain(given, out / GIVEN)
        # No journal: the demo takes a minute, and a second one in the same folder starts from the beginning.
        result, facts = run_pipeline(given, recipe, task, out, journal=False, force=True, observer=observer)
        facts["unpacked"] = unpacked(out, result, task)
    write_text(out / REPORT, to_json(facts) + "\n")
    return facts


def trained(task: Task, observer: Observer) -> State:
    """The network to compress, trained by the step Finetune."""
    step = Finetune(epochs=EPOCHS, lr=0.003)
    net_trained = run(net(), step, task, observer=Training(observer)).model()
    return start(net_trained, task)  # the trained net is the given model


class Training(Observer):
    """An observer that names the training of the given network as such."""

    def __init__(self, observer: Observer):
        self.observer = observer

    def step(self, number: int, total: int, name: str) -> None:
        self.observer.step(number, total, "train the network to compress")

    def progress(self, done: int, total: int, text: str = "") -> None:
        self.observer.progress(done, total, text)


def unpacked(out: Path, result: State, task: Task) -> dict[str, Any]:
    """Unpack the file, put the weights into a fresh network, and compare its scores with the result's."""
    nbytes = unpack(out / MODEL, out / UNPACKED)
    module = load(out / MODEL).model(net())  # a fresh network with the widths of the slim one
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    put_in(module, str(out / UNPACKED))
    scores, wanted = task.scores(module), task.scores(result.model())
    if not torch.equal(scores, wanted):
        raise RefusedError(f"{out / UNPACKED}: {int((scores != wanted).sum())} samples score differently")
    return {"name": UNPACKED, "nbytes": nbytes, "accuracy": float(scores.mean()), "n": len(scores)}


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch uses one thread inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def report(facts: Mapping[str, Any]) -> Iterator[RenderableType]:
    """The output of `run`, and a line on the unpacked weights."""
    yield from tables(facts)
    found = facts["unpacked"]
    yield (
        f"unpacked: {found['name']}, {whole(found['nbytes'])} bytes, scores {percent(found['accuracy'])} "
        f"in a fresh network: the same on each of {whole(found['n'])} samples"
    )
