"""Architectures: many models through prune, quantize, entropy, distill, a file and back, with a verdict each.

python bench/architectures.py [--record] [NAME ...]     a name of bench/zoo.py, a glob, a family
    right      the loaded model passes all checks of bench/sound.py: zeros, grids, untouched tensors, ledger,
               outputs bit for bit
    refused    Tersor's error says what it cannot do and what to do instead
    wrong      a check fails, or a crash without an error of Tersor's
One process a model, two at a time, each with a limit of processor time. Entropy runs before distill, so that
coded leaves are trained, and after it, so that they are in the file. Weights are untrained, so accuracy is
not measured here.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from sound import Asked, differing, edited, faults, given, untouched
from sweep import PATIENCE, answered, chosen, told
from table import Row
from torch import nn
from zoo import CASES, Case

import tersor
from tersor.errors import TersorError

SECONDS, AT_ONCE = 600, 2  # of processor time, which other load on the machine does not change
ASKED = Asked(keep=0.5, bits=4)
NOISE = 0.02
FAULTS = 3  # printed for one model


@dataclass(frozen=True)
class Outcome:
    """The result of one model."""

    name: str
    verdict: str  # "right", "refused", "wrong" or "missing"
    said: str = ""
    weights: int = 0  # parameters with two axes or more
    done: int = 0  # of them pruned and quantized
    seconds: float = 0.0  # of processor time
    megabytes: float = 0.0  # at the peak, of the whole process


def fresh(case: Case, seed: int) -> nn.Module:
    """A model without constant tensors: ones and zeros would hide tensors that are mixed up."""
    torch.manual_seed(seed)
    model = case.make()
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.requires_grad and tensor.is_floating_point():
                tensor.add_(NOISE * torch.randn_like(tensor))
    return model.eval()


def swept(name: str, case: Case) -> Outcome:
    """Run one model through all steps in this process."""
    try:
        model = fresh(case, seed=0)
    except ImportError as error:
        return Outcome(name, "missing", str(error))
    was, task = given(model), case.task()
    weights, done = len(was.weights), 0
    try:
        task.check(model)  # the metric too, which no step needs
        entropy = tersor.Entropy(coder="fast")
        steps = [
            tersor.Prune(keep=ASKED.keep, per="tensor"), tersor.Quantize(bits=ASKED.bits), entropy,
            tersor.Distill(epochs=1, **case.distill), entropy,
        ]  # fmt: skip
        result = tersor.run(model, steps, task)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.tersor"
            tersor.save(result, path)
            loaded = tersor.load(path).model(fresh(case, seed=1))
        touched = edited(result)
        done = sum({"prune", "quantize"} <= touched.get(w, set()) for w in was.weights)
        found = [*faults(was, result, loaded, ASKED), differing(task, loaded, result.model())]
        found = [fault for fault in (*found, untouched(was, model)) if fault]
        verdict, said = ("wrong", listing(found)) if found else ("right", "")
    except TersorError as error:
        verdict, said = "refused", str(error)
    except Exception as error:  # a crash of one model is a finding, and the sweep goes on
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        verdict, said = "wrong", f"crashed: {type(error).__name__}: {error} ({where})"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    return Outcome(name, verdict, said, weights, done, time.process_time(), peak)


def listing(found: list[str]) -> str:
    more = f"; and {len(found) - FAULTS} more" if len(found) > FAULTS else ""
    return "; ".join(found[:FAULTS]) + more


def apart(name: str, seconds: int = SECONDS, patience: float = PATIENCE) -> Outcome:
    """The same in a separate process."""
    found = answered(__file__, name, seconds, patience=patience)
    return Outcome(**found | {"verdict": {"crashed": "wrong"}.get(found["verdict"], found["verdict"])})


def line(outcome: Outcome) -> str:
    done = f"{outcome.done}/{outcome.weights}"
    numbers = f"{done:>9} {outcome.seconds:6.1f} s {outcome.megabytes:6.0f} MB"
    who = f"{CASES[outcome.name].family:13} {outcome.name:38} {outcome.verdict:8}"
    return f"{who} {numbers}  {outcome.said}".rstrip()


def rows(outcomes: list[Outcome]) -> Iterator[Row]:
    """How many models are right in each family that was swept completely."""
    for family in dict.fromkeys(case.family for case in CASES.values()):
        mine = [outcome for outcome in outcomes if CASES[outcome.name].family == family]
        count = sum(case.family == family for case in CASES.values())
        if len(mine) < count or any(outcome.verdict == "missing" for outcome in mine):
            continue
        bad = [f"{o.name} {o.verdict}" for o in mine if o.verdict != "right"]
        right = count - len(bad)
        yield Row(
            "architectures", family, "models right", right, f"of {count}", f">= {count}", note=", ".join(bad)
        )
        wrong = sum(o.verdict == "wrong" for o in mine)
        yield Row("architectures", family, "models silently wrong or crashed", wrong, f"of {count}", "<= 0")
        done, weights = (sum(getattr(o, word) for o in mine) for word in ("done", "weights"))
        note = "of the others the ledger says why not"
        yield Row("architectures", family, "weights pruned and quantized", done, f"of {weights}", note=note)


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
            print(json.dumps(asdict(swept(name, CASES[name]))))
        return 0
    outcomes = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for outcome in pool.map(partial(apart, seconds=options.seconds), names):
            outcomes.append(outcome)
            print(line(outcome), flush=True)
    told(list(rows(outcomes)), options.record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
