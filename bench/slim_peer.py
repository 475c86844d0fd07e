"""Slim peer: prune, tune and score one network with another library, in an interpreter that has it.

PYTHON bench/slim_peer.py SUBJECT FACTOR METHOD [--multiple 8] [--seconds 60] [--seed 0] [--out FOLDER]
METHOD
    magnitude   Torch-Pruning, L2 norm of each group, the same share of every layer         Fang 2023
    taylor      the same with |weight * gradient|, each step on 128 other training images   Molchanov 2019
    kirigami    torch-kirigami, L2 norm of each group, the same share of every layer
Torch-Pruning removes half a percent of the channels at a time; the step counts whose factor is nearest to the
asked one. Then it is tuned for SECONDS of processor time: labels, SGD, one cycle, bfloat16, flips. The last
line is JSON (`Outcome`); FOLDER gets the answers (.npy) and the network (.onnx). bench/slim.py runs it, and
uses `ended`, `macs` and `export` for its own side. It needs torch, torch-pruning, torch-kirigami, onnx.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

HERE = Path(__file__).resolve().parent
if str(HERE.parent / "src") not in sys.path:
    sys.path.append(str(HERE.parent / "src"))  # networks.py needs tersor's reader of IDX files, nothing else

from child import NOT_INSTALLED, answer  # noqa: E402
from networks import load, task  # noqa: E402

from tersor.model.task import Task  # noqa: E402

STEPS, MOST = 200, 0.9  # of pruning: each removes 1 / STEPS of the channels; the largest share of a layer
BATCH, LR, MOMENTUM, DECAY = 128, 0.05, 0.9, 5e-4
RISE = 0.25  # share of the tuning in which the learning rate rises
CLASSES = 10


@dataclass(frozen=True)
class Outcome:
    """One network, pruned and tuned by one method. Seconds are of processor time, with one thread."""

    subject: str
    method: str
    asked: float  # times fewer MACs
    seed: int
    macs: float = 0.0  # times fewer
    parameters: float = 0.0  # times fewer
    before: float = 0.0  # accuracy without tuning, %
    after: float = 0.0  # with, %
    pruning: float = 0.0  # seconds
    tuning: float = 0.0
    epochs: float = 0.0
    widths: str = ""  # channels of the convolutions
    answers: str = ""  # file: 1 for each image that is right, [10000] uint8
    onnx: str = ""


# Pruning


def torch_pruning(net: nn.Module, on: Task, factor: float, multiple: int, importance: str) -> nn.Module:
    """The network of the step whose factor is nearest to the asked one."""
    import torch_pruning as tp

    images, labels = on.train.dataset.tensors
    head = [part for part in net.modules() if isinstance(part, nn.Linear) and part.out_features == CLASSES]
    taylor = importance == "taylor"
    pruner = tp.pruner.BasePruner(
        net,
        images[:2],
        importance=tp.importance.GroupTaylorImportance() if taylor
        else tp.importance.GroupMagnitudeImportance(p=2),
        global_pruning=False,
        pruning_ratio=1.0,
        max_pruning_ratio=MOST,
        iterative_steps=STEPS,
        ignored_layers=head,
        round_to=multiple if multiple > 1 else None,
    )  # fmt: skip
    given, best, distance = macs(net), net, math.inf
    for step in range(STEPS):
        if taylor:
            some = slice(step * BATCH, (step + 1) * BATCH)
            net.zero_grad()
            F.cross_entropy(net(images[some]), labels[some]).backward()
        pruner.step()
        found = given / macs(net)
        if (far := abs(math.log(found / factor))) < distance:
            best, distance = copy.deepcopy(net), far
        if found >= factor:
            break
    best.zero_grad(set_to_none=True)
    return best


def kirigami(net: nn.Module, _: Task, factor: float, multiple: int) -> nn.Module:
    """One plan with the same share of channels everywhere. Its search takes minutes: no second try."""
    from torch_kirigami import DependencyGraph
    from torch_kirigami.pruning import ChannelRatio, Granularity, Greedy, GroupMagnitude, Pruner

    graph = DependencyGraph.build(net, args=(torch.zeros(2, 1, 28, 28),))
    pruner = Pruner(net, graph=graph, granularity=Granularity(default=multiple))
    ratio = round(1 - factor**-0.5, 3)  # MACs go with the square of the widths
    return pruner.prune(
        pruner.discover_candidates(), budget=ChannelRatio(ratio), strategy=Greedy(GroupMagnitude(p=2))
    )[0]


PRUNERS: dict[str, Callable[[nn.Module, Task, float, int], nn.Module]] = {
    "magnitude": lambda net, on, factor, multiple: torch_pruning(net, on, factor, multiple, "magnitude"),
    "taylor": lambda net, on, factor, multiple: torch_pruning(net, on, factor, multiple, "taylor"),
    "kirigami": kirigami,
}


# Tuning


def tune(net: nn.Module, on: Task, seconds: float, seed: int) -> tuple[float, float]:
    """Train for that many seconds of processor time. Returns the seconds that it took, and the epochs.

    The learning rate follows the clock, so the cycle ends when the time does.
    """
    images, labels = on.train.dataset.tensors
    net.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), LR, momentum=MOMENTUM, nesterov=True, weight_decay=DECAY)
    began, steps = time.process_time(), 0
    for chosen, flipped in orders(len(images), seed):
        gone = (time.process_time() - began) / seconds
        if gone >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = LR * rate(gone)
        batch = torch.where(flipped[:, None, None, None], images[chosen].flip(3), images[chosen])
        with torch.autocast("cpu", torch.bfloat16):
            output = net(batch.contiguous(memory_format=torch.channels_last))
        optimizer.zero_grad()
        F.cross_entropy(output.float(), labels[chosen]).backward()
        optimizer.step()
        steps += 1
    net.eval().to(memory_format=torch.contiguous_format)
    return time.process_time() - began, steps * BATCH / len(images)


def orders(count: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Without end: the images of a batch, and which of them are flipped."""
    drawn = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=drawn)
        for chosen in order.split(BATCH)[: count // BATCH]:
            yield chosen, torch.rand(BATCH, generator=drawn) < 0.5


def rate(gone: float) -> float:
    """The factor of the learning rate after this share of the tuning: a line up, half a cosine down."""
    return gone / RISE if gone < RISE else 0.5 * (1 + math.cos(math.pi * (gone - RISE) / (1 - RISE)))


# Measuring: the same for both sides


def macs(net: nn.Module) -> int:
    """Multiplications of convolutions and linear layers for one image."""
    total, hooks = [0], []

    def add(part: nn.Module, _: object, output: Tensor) -> None:
        one = part.in_features if isinstance(part, nn.Linear) else part.weight[0].numel()
        total[0] += output.numel() * one

    for part in net.modules():
        if isinstance(part, (nn.Conv2d, nn.Linear)):
            hooks.append(part.register_forward_hook(add))
    training = net.training
    with torch.no_grad():
        net.eval()(torch.zeros(1, 1, 28, 28))
    net.train(training)
    for hook in hooks:
        hook.remove()
    return total[0]


def answers(net: nn.Module, on: Task) -> np.ndarray:
    """1 for each test image that is right, else 0. [10000] uint8"""
    return on.scores(net).to(torch.uint8).numpy()


def percent(right: np.ndarray) -> float:
    return round(100 * float(right.mean()), 2)


def widths(net: nn.Module) -> str:
    return " ".join(str(part.out_channels) for part in net.modules() if isinstance(part, nn.Conv2d))


def export(net: nn.Module, path: Path, shape: tuple[int, ...] = (1, 28, 28)) -> None:
    """The network for any batch of inputs of this shape, weights inside the file."""
    torch.onnx.export(
        net.eval(), (torch.zeros(2, *shape),), str(path), dynamo=True, external_data=False, verbose=False,
        input_names=["input"], output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )  # fmt: skip


def ended(found: Outcome, given: nn.Module, net: nn.Module, on: Task, options: argparse.Namespace) -> Outcome:
    """The outcome with what is measured at the end. With --out, the answers and the network as files."""
    out, tag = options.out, tag_of(options)
    right = answers(net, on)
    found = replace(
        found,
        macs=round(macs(given) / macs(net), 3),
        parameters=round(size(given) / size(net), 3),
        after=percent(right),
        widths=widths(net),
    )
    if out is None:
        return found
    out.mkdir(parents=True, exist_ok=True)
    found = replace(found, answers=str(out / f"{tag}.npy"), onnx=str(out / f"{tag}.onnx"))
    np.save(found.answers, right)
    export(net, Path(found.onnx))
    return found


def size(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def options_of(doc: str | None, methods: list[str]) -> argparse.ArgumentParser:
    """The command line of one run, on either side."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("subject", help="a network of bench/networks.py")
    parser.add_argument("factor", type=float, help="times fewer MACs")
    parser.add_argument("method", choices=methods)
    parser.add_argument("--multiple", type=int, default=1, help="channels of a layer: a multiple of this")
    parser.add_argument("--seconds", type=float, default=0.0, help="processor time of the tuning")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder of the answers and the .onnx file")
    return parser


def tag_of(options: argparse.Namespace) -> str:
    shape = f"{options.factor:g}x" + (f"-m{options.multiple}" if options.multiple > 1 else "")
    return f"{options.subject}-{shape}-{options.method}-{options.seed}"


def main(argv: list[str]) -> int:
    options = options_of(__doc__, list(PRUNERS)).parse_args(argv)
    lines = answer()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    given, on = load(options.subject), task(batch=BATCH)
    began = time.process_time()
    try:
        net = PRUNERS[options.method](copy.deepcopy(given), on, options.factor, options.multiple)
    except ImportError as error:
        print(f"{options.method}: not installed: {error}", file=sys.stderr)
        return NOT_INSTALLED
    found = Outcome(options.subject, options.method, options.factor, options.seed)
    found = replace(found, pruning=time.process_time() - began, before=percent(answers(net, on)))
    if options.seconds:
        tuning, epochs = tune(net, on, options.seconds, options.seed)
        found = replace(found, tuning=tuning, epochs=epochs)
    found = ended(found, given, net, on, options)
    lines.write(json.dumps(asdict(found)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
