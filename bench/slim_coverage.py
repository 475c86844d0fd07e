"""Slim coverage: 30 % of the parameters of 78 architectures: how much goes, and whether the result is right.

python bench/slim_coverage.py [--record] [--seconds 300] [NAME ...]     a name of bench/slim_zoo.py, a glob,
                                                                       a family
exact      first only units whose removal equals a zero; then, if less than a quarter of the parameters of
flagged    convolutions, linear and recurrent layers went, also those that a normalizer counts
Checks of a result that are independent of slim's own proof, in float64 if the model runs in it:
    values     each tensor is the given one without the removed slices, bit for bit (nothing is refitted here)
    outputs    exact: those of the given model with zeros in the removed slices; flagged: their shapes, finite
    given      the given model is as it was
Weights are untrained; biases and scales are random, or many mistakes would be invisible, and batch norms are
calibrated, or the input would not reach the outputs. One process a model, two at a time, each with a limit of
processor time.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from slim_zoo import CASES, Case, with_norms
from sweep import answered, chosen, told
from table import Row
from torch import Tensor, nn

from tersor.core.run import run
from tersor.core.state import State
from tersor.errors import TersorError
from tersor.model.outputs import tensors_of
from tersor.model.task import Task

SECONDS, AT_ONCE = 300, 2  # of processor time for one model, which other load does not change; processes
SAMPLES = 4  # that calibrate batch norms
KEEP = 0.7  # share of all parameters that slim is asked to keep
ENOUGH = 0.25  # share of the parameters of products that has to go
LEAST = {"proved": 78, "enough": 72, "own": 66}  # models, the targets
PRODUCTS = ("linear", "conv", "convtranspose", "attention", "recurrent")  # kinds of sites
APART = {torch.float64: 1e-7, torch.float32: 1e-3}  # of the largest output, that rounding may cause


@dataclass(frozen=True)
class Outcome:
    """The result of one model."""

    name: str
    verdict: str = "done"  # or "refused", "wrong", "crashed", "missing"
    mode: str = ""  # "exact" or "flagged"
    proved: bool = False  # by slim itself
    own: bool = False  # the result is an instance of the model's own class
    gone: float = 0.0  # share of the parameters of products
    exact_gone: float = 0.0  # the same for the first, exact run
    frozen: float = 0.0  # share of all parameters that no cut can remove
    apart: float = 0.0  # of the outputs, relative to the largest
    export: float = 0.0  # seconds of torch.export
    groups: float = 0.0  # of the labels, the solver, the families
    cut: float = 0.0  # of the whole step
    seconds: float = 0.0  # of processor time, everything included
    said: str = ""


# The seam: all that is known of slim is here.


def slimmed(model: nn.Module, task: Task, exact: bool) -> State:
    from tersor.steps import Slim

    step = Slim(keep=KEEP, of="parameters", by="l2", correct=False, exact=exact)
    return run(model, [step], task)


def proof_of(state: State) -> tuple[bool, str]:
    """(whether the cut was proved, what was said if not)."""
    bad = [entry.text for kind in ("refused", "void") for entry in state.ledger.notes(kind)]
    good = list(state.ledger.notes("proved"))
    return bool(good) and not bad, "; ".join(bad)


def frozen_share(state: State) -> float:
    """The share of the parameters that slim could not remove if it were asked for as few as possible."""
    budget = next(iter(state.ledger.notes("budget")), None)
    return 0.0 if budget is None else budget.data["least"] / budget.data["before"]


def timed_groups(model: nn.Module, example: Tensor) -> tuple[float, float]:
    """Seconds of the export, and of the groups without it."""
    from tersor.model.channels.groups import groups_of
    from tersor.model.channels.walk import Walk
    from tersor.model.graph import traced

    began = time.perf_counter()
    graph = traced(model, (example,))
    middle = time.perf_counter()
    groups_of(Walk(graph, set(model.state_dict())))
    return middle - began, time.perf_counter() - middle


# One model


def fresh(case: Case) -> tuple[nn.Module, Tensor]:
    """A model without constant tensors, and its example: ones and zeros would hide what is mixed up."""
    torch.manual_seed(0)
    model = case.make().eval()
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.is_floating_point():
                tensor.add_((0.1 if tensor.ndim < 2 else 0.01) * torch.randn_like(tensor))
    with_norms(model, torch.cat([case.example() for _ in range(SAMPLES)]))
    torch.manual_seed(1)
    return model, case.example()


def examined(name: str, case: Case) -> Outcome:
    """Cut one model in this process, exactly first."""
    found = Outcome(name)
    try:
        model, example = fresh(case)
    except ImportError as error:
        return replace(found, verdict="missing", said=str(error))
    try:
        export, groups = timed_groups(model, example)
        found = replace(found, export=export, groups=groups)
        first = attempt(found, model, example, exact=True)
        found = replace(first, exact_gone=first.gone)
        if first.verdict in ("done", "refused") and first.gone < ENOUGH:
            second = replace(attempt(found, model, example, exact=False), exact_gone=first.gone)
            if second.verdict in ("wrong", "crashed") or second.gone > first.gone or not first.proved:
                found = second
    except TersorError as error:
        found = replace(found, verdict="refused", said=str(error))
    except Exception as error:  # a crash with one model is a finding, and the sweep goes on
        found = replace(found, verdict="crashed", said=place_of(error))
    return replace(found, seconds=time.process_time())


def attempt(found: Outcome, model: nn.Module, example: Tensor, exact: bool) -> Outcome:
    """One run of slim and all checks of its result."""
    found = replace(found, mode="exact" if exact else "flagged", said="")
    task = Task("coverage", evaluate=[(example, torch.zeros(1, dtype=torch.long))], calibrate=[(example,)])
    given = {name: tensor.clone() for name, tensor in tensors(model).items()}
    began = time.perf_counter()
    try:
        state = slimmed(model, task, exact)
    except TersorError as error:
        return replace(found, verdict="refused", said=str(error), cut=time.perf_counter() - began)
    result = state.model().eval()
    proved, said = proof_of(state)
    found = replace(
        found,
        verdict="done" if proved else "refused",
        proved=proved,
        said=said,
        own=type(result) is type(model),
        gone=gone_share(state),
        frozen=frozen_share(state),
        cut=time.perf_counter() - began,
    )
    faults = [changed_values(given, result, state.kept), changed_given(given, model)]
    masked = zeroed(model, state.kept) if exact and state.kept else None  # a refused cut was taken back
    apart, fault = differing(masked, model, result, example)
    said = "; ".join(fault for fault in (*faults, fault) if fault)
    return replace(found, apart=apart, verdict="wrong", said=said) if said else replace(found, apart=apart)


def place_of(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"


def gone_share(state: State) -> float:
    """The share of the parameters of convolutions, linear and recurrent layers that was removed."""
    sites = [name for name, site in state.sites.items() if site.kind in PRODUCTS and name in state.forms]
    was = sum(int(np.prod(state.sites[name].shape)) for name in sites)
    now = sum(int(np.prod(state.shape(name))) for name in sites)
    return 1 - now / was if was else 0.0


# Checks

Kept = Mapping[str, Mapping[int, Sequence[int]]]  # tensor -> axis -> the given indices that stay


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def without(tensor: Tensor, kept: Mapping[int, Sequence[int]]) -> Tensor:
    """The tensor with only these indices of each axis."""
    for axis, indices in kept.items():
        tensor = tensor.index_select(axis, torch.tensor(indices))
    return tensor


def zeroed(model: nn.Module, kept: Kept) -> nn.Module:
    """A copy of the given model with zeros in the removed slices of every tensor."""
    copied = copy.deepcopy(model)
    every = tensors(copied)
    with torch.no_grad():
        for name, axes in kept.items():
            for axis, indices in axes.items():
                stays = torch.zeros(every[name].shape[axis], dtype=torch.bool)
                stays[torch.tensor(indices)] = True
                every[name].index_fill_(axis, (~stays).nonzero().flatten(), 0)
    return copied


def changed_values(given: Mapping[str, Tensor], result: nn.Module, kept: Kept) -> str:
    found = tensors(result)
    for name, tensor in given.items():
        if name not in found:
            return f"{name} is gone"
        if not torch.equal(found[name], without(tensor, kept.get(name, {}))):
            return f"{name} has other values than those that stay"
    return ""


def changed_given(given: Mapping[str, Tensor], model: nn.Module) -> str:
    now = tensors(model)
    same = now.keys() == given.keys() and all(torch.equal(now[name], given[name]) for name in given)
    return "" if same else "the given model was changed"


def differing(
    masked: nn.Module | None, model: nn.Module, result: nn.Module, example: Tensor
) -> tuple[float, str]:
    """(how far the result's outputs are from the masked model's, what is wrong). Without a masked model only
    the shapes are compared with those of the given model."""
    dtype = torch.float64 if runs(model, example, torch.float64) else torch.float32
    try:
        found = outputs(result, example, dtype)
    except (RuntimeError, ValueError) as error:
        return 0.0, f"the result does not run: {place_of(error)}"
    wanted, limit = outputs(masked or model, example, dtype), APART[dtype]
    if [x.shape for x in found] != [x.shape for x in wanted]:
        return 0.0, f"outputs are {[list(x.shape) for x in found]}, not {[list(x.shape) for x in wanted]}"
    if not all(bool(x.isfinite().all()) for x in found):
        return 0.0, "outputs are not finite"
    if masked is None:
        return 0.0, ""
    apart = max(relative(x, y) for x, y in zip(found, wanted, strict=True))
    if not apart <= limit:
        return apart, f"outputs differ by {apart:.2g} from those with zeros in place of what was removed"
    moved = max(relative(x, y) for x, y in zip(wanted, outputs(model, example, dtype), strict=True))
    return apart, "" if moved > limit else "zeros in place of what was removed change nothing: no test"


def runs(model: nn.Module, example: Tensor, dtype: torch.dtype) -> bool:
    try:
        outputs(model, example, dtype)
    except RuntimeError:  # a float32 inside its code
        return False
    return True


def outputs(model: nn.Module, example: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The floating-point outputs of a copy of the model in this precision."""
    copied = copy.deepcopy(model).to(dtype).eval()
    with torch.no_grad():
        answer = copied(example.to(dtype) if example.is_floating_point() else example)
    return [x for x in tensors_of(answer) if x.is_floating_point()]


def relative(x: Tensor, y: Tensor) -> float:
    return float((x - y).abs().max() / y.abs().max().clamp_min(1e-30))


# All models


def apart(name: str, seconds: int) -> Outcome:
    """One model in a process of its own."""
    return Outcome(**answered(__file__, name, seconds))


def line(found: Outcome) -> str:
    words = f"{'proved' if found.proved else '':7}{'own' if found.own else '':4}"
    shares = f"gone {found.gone:6.1%} frozen {found.frozen:6.1%} apart {found.apart:7.1e}"
    times = f"export {found.export:5.1f} groups {found.groups:5.1f} cut {found.cut:6.1f} s"
    return f"{found.name:44} {found.verdict:8}{found.mode:8}{words}{shares}  {times}  {found.said}".rstrip()


def rows(found: list[Outcome]) -> Iterator[Row]:
    """The targets, if every model was tried."""
    if len(found) < len(CASES) or any(one.verdict == "missing" for one in found):
        return
    tests: dict[str, tuple[str, Callable[[Outcome], bool]]] = {
        "proved": ("cuts proved", lambda one: one.proved),
        "enough": (
            f"models with {ENOUGH:.0%} of the products' parameters gone",
            lambda one: one.gone >= ENOUGH,
        ),
        "own": ("of them in their own class", lambda one: one.own and one.proved),
    }
    for key, (what, test) in tests.items():
        rest = ", ".join(one.name for one in found if not test(one))
        count = sum(map(test, found))
        yield Row("slim_coverage", "all", what, count, f"of {len(found)}", f">= {LEAST[key]}", note=rest)
    bad = [one for one in found if one.verdict in ("wrong", "crashed")]
    note = ", ".join(f"{one.name} {one.verdict}" for one in bad)
    yield Row(
        "slim_coverage", "all", "silently wrong or crashed", len(bad), f"of {len(found)}", "<= 0", note=note
    )
    exact = sum(one.exact_gone >= ENOUGH for one in found)
    yield Row("slim_coverage", "all", "models for which exact units are enough", exact, f"of {len(found)}")
    for word in ("export", "groups", "cut"):
        times = sorted((getattr(one, word), one.name) for one in found)
        note = f"longest {times[-1][0]:.1f} s, {times[-1][1]}"
        middle = round(times[len(times) // 2][0], 2)
        yield Row("slim_coverage", "all", f"time, {word}, median", middle, "s", note=note)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="a model, a glob or a family; default: all")
    parser.add_argument("--record", action="store_true", help="put the numbers into bench/results.csv")
    parser.add_argument("--here", action="store_true", help="one model, in this process, as a line of JSON")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="processor time that a model may take")
    options = parser.parse_args(argv)
    try:
        names = chosen(options.names, CASES)
    except KeyError as error:
        parser.error(f"no model {error}; there are {', '.join(CASES)}")
    if options.here:
        torch.set_num_threads(1)
        resource.setrlimit(resource.RLIMIT_CPU, (options.seconds, options.seconds + 10))
        for name in names:
            print(json.dumps(asdict(examined(name, CASES[name]))))
        return 0
    found = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for one in pool.map(partial(apart, seconds=options.seconds), names):
            found.append(one)
            print(line(one), flush=True)
    told(list(rows(found)), options.record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
