"""Comparisons: the techniques side by side on small networks: accuracy, bytes, time, and training.

python bench/comparisons.py [--quick] [--again] [TABLE ...]      make tables
recipe     tersor.run on a trained network of bench/networks.py, in the words of comparison_rows.py
file       written, read back into a new network, and scored on the 10,000 test images, paired by image
time       with `timed`: both networks exported, then as `tersor compare --latency`, in each runtime that can
           be imported; and bench/inference.py for memory and processor time
A finished row goes into bench/comparisons.jsonl, so that a killed run continues; a row whose recipe has
changed is a new one. docs/tables.md is written from that file and from that of bench/tables.py. --quick: 2 %
of the epochs, 1,000 test images, two rows of each group, no ResNet-20.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import networks
import tables_page
import torch
from child import replies
from comparison_rows import TABLES, Trial
from rows_file import COMPARISON_ROWS, Row, keep, processor, read, record, shorter
from shorten import macs
from torch import Tensor, nn

import tersor
from tersor.candidates.candidate import candidate
from tersor.candidates.export import export
from tersor.candidates.timed import timed
from tersor.core.state import start
from tersor.errors import MissingError, RefusedError, SettingError, SiteError, TersorError
from tersor.measure.accuracy import compared
from tersor.model.loader import TensorBatches
from tersor.runtimes import RUNTIMES, check_runtime
from tersor.steps import Entropy, recipe_from_words

INFERENCE = networks.ROOT / "bench" / "inference.py"
QUICK, QUICK_IMAGES = 0.02, 1000
SLOW = "resnet20"
COUNTERS = Path("/sys/class/powercap")  # of energy, where the kernel shows them
LIMIT = 300  # seconds of bench/inference.py
REFUSALS = (RefusedError, SettingError, SiteError)  # what a recipe may end with; all else is a failure


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(TABLES)}")
    parser.add_argument("--quick", action="store_true", help="2 %% of the epochs, 1,000 images")
    parser.add_argument("--again", action="store_true", help="measure rows that are recorded, too")
    options = parser.parse_args(argv)
    if unknown := set(options.tables) - set(TABLES):
        parser.error(f"no table {', '.join(sorted(unknown))}; there are {', '.join(TABLES)}")
    networks.steady()
    wanted = asked(options.tables or list(TABLES), options.quick)
    try:
        networks.task()
        for net in {trial.net.partition(":")[0] for trial in wanted}:
            networks.weights(net)
    except MissingError as error:
        parser.exit(1, f"{error}\n")
    keep({trial.key for rows in TABLES.values() for trial in rows}, COMPARISON_ROWS, key)
    failed = []
    for trial in wanted:
        if not options.again and done(trial, read(COMPARISON_ROWS), options.quick):
            continue
        try:
            row = measured(trial, options.quick)
        except TersorError as error:
            print(f"comparisons: {trial.key}: {error}", file=sys.stderr, flush=True)
            failed.append(trial)
            continue
        record(row, COMPARISON_ROWS, key)
        print(said(row), flush=True)
        tables_page.write()
    tables_page.write()
    return 1 if failed else 0


def asked(letters: list[str], quick: bool) -> list[Trial]:
    """The trials of these tables, each once; it is timed if a table wants that."""
    every = [trial for rows in TABLES.values() for trial in rows if trial.words]
    clocked = {trial.key for trial in every if trial.timed}
    mine = [trial for letter in letters for trial in (ends if quick else list)(TABLES[letter])]
    found = {trial.key: replace(trial, timed=trial.key in clocked) for trial in mine if trial.words}
    return sorted(found.values(), key=lambda trial: trial.net == SLOW)  # what takes minutes comes last


def ends(rows: list[Trial]) -> list[Trial]:
    """The first and the last row of each group, of seed 0 and small networks."""
    groups: dict[str, list[Trial]] = {}
    for trial in rows:
        if trial.words and trial.seed == 0 and trial.net != SLOW:
            groups.setdefault(trial.group, []).append(trial)
    return [trial for group in groups.values() for trial in dict.fromkeys((group[0], group[-1]))]


def key(row: Row) -> tuple[str, str, int]:
    return row["net"], row["recipe"], row["seed"]


def done(trial: Trial, rows: list[Row], quick: bool) -> bool:
    return any(key(row) == trial.key and (quick or not row["quick"]) for row in rows)


def measured(trial: Trial, quick: bool) -> Row:
    """The row of a trial. A recipe that Tersor refuses is a row too, with its reason."""
    row = {
        "net": trial.net, "recipe": trial.words, "seed": trial.seed, "quick": quick,
        "machine": f"{processor()}, load {os.getloadavg()[1]:.1f} of {os.cpu_count()}",
        "energy": f"not measured: {'its counter is not read' if any(COUNTERS.glob('*')) else 'no counter'}",
        "trained": training(trial.net),
    }  # fmt: skip
    try:
        return row | found(trial, quick)
    except REFUSALS as error:
        return row | {"refused": " ".join(str(error).split())}


def found(trial: Trial, quick: bool) -> Row:
    """The facts of a row: training, bytes, accuracy, numbers, and times."""
    on, base = data(quick), trial.net.partition(":")[0]
    recipe = recipe_from_words(located(trial.words).split(), trial.seed)
    if quick:
        recipe = shorter(recipe, QUICK)
    *steps, last = recipe.steps
    if not isinstance(last, Entropy):
        raise SettingError(f"comparisons: {trial.words!r} must end with entropy")
    began = time.process_time()
    plain = start(made(trial), on)
    if steps:
        plain = tersor.run(plain, replace(recipe, steps=tuple(steps)), on)
    seconds = time.process_time() - began
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.tersor"
        nbytes = {"given": networks.weights(base).stat().st_size, "plain": tersor.save(plain, path)}
        nbytes["coded"] = tersor.save(tersor.run(plain, last, on), path)
        model = tersor.load(path).model(made(trial)).eval()
        image = next(iter(on.batches("evaluate")))[0][:1]
        given = networks.load(base)
        facts = {
            "seconds": round(seconds, 1), "bytes": nbytes,
            "accuracy": compared(given_scores(base, quick), on.scores(model), on.scored),
            "weights": [nonzero(given), nonzero(model)], "macs": [macs(given, image), macs(model, image)],
        }  # fmt: skip
        return facts | ({"runtimes": times(trial, path, image, quick)} if trial.timed else {})


def times(trial: Trial, path: Path, image: Tensor, quick: bool) -> dict[str, Row]:
    """By runtime: `tersor compare --latency` of the given network and of the file, and both alone."""
    base = trial.net.partition(":")[0]
    on, found = replace(data(quick), example=(image,)), {}
    for name in present():
        before, after = exported(base, name), path.with_name(f"{name}.onnx")
        export(candidate(str(path), made(trial)), after, on, to=name, dynamic_batch=False)
        both = (candidate(str(file), runtime=name, threads=1) for file in (before, after))
        found[name] = timed(*both, on, runtime=name) | {
            "before alone": alone(name, before), "after alone": alone(name, after)
        }  # fmt: skip
    return found


@cache
def exported(base: str, name: str) -> Path:
    """The given network's file for a runtime, in a folder that lasts as long as this process."""
    path = Path(kept().name) / f"{base}.{name}.onnx"
    on = data(quick=False)
    image = next(iter(on.batches("evaluate")))[0][:1]
    export(
        candidate("base", networks.load(base)),
        path,
        replace(on, example=(image,)),
        to=name,
        dynamic_batch=False,
    )
    return path


@cache
def kept() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


@cache
def alone(name: str, file: Path) -> Row:
    answers = replies([sys.executable, str(INFERENCE), name, str(file)], LIMIT)
    if not answers:
        raise MissingError(f"comparisons: {INFERENCE.name} gave no answer for {file.name}")
    return answers[0]


def present() -> Iterator[str]:
    """The runtimes that can be imported."""
    for name in RUNTIMES:
        try:
            check_runtime(name, "comparisons")
        except MissingError as error:
            print(f"comparisons: {error}", file=sys.stderr)
        else:
            yield name


@cache
def data(quick: bool) -> tersor.Task:
    on = networks.task()
    if not quick:
        return on
    images, labels = (tensor[:QUICK_IMAGES] for tensor in on.evaluate.dataset.tensors)
    return replace(on, evaluate=TensorBatches(images, labels, batch=500), fingerprint=None)


@cache
def given_scores(net: str, quick: bool) -> Tensor:
    return data(quick).scores(networks.load(net))


def made(trial: Trial) -> nn.Module:
    """The trained network; or, with widths, an untrained one whose first weights follow from the seed."""
    name, _, sizes = trial.net.partition(":")
    if not sizes:
        return networks.load(name)
    with torch.random.fork_rng():
        torch.manual_seed(trial.seed)
        return networks.NETWORKS[name](*map(int, sizes.split(",")))


def located(words: str) -> str:
    """The recipe with the path of the teacher's weights."""
    head, file, tail = words.partition("teacher_file=")
    name, _, rest = tail.partition(" ")
    return f"{head}{file}{networks.weights(Path(name).stem)} {rest}" if file else words


def training(net: str) -> Row | None:
    """Epochs and seconds of the given network's training, as the file beside its weights has them."""
    path = networks.weights(net.partition(":")[0]).with_suffix(".json")
    facts = json.loads(path.read_text()) if path.exists() else {}
    return {word: facts[word] for word in ("epochs", "seconds")} if "seconds" in facts else None


def nonzero(model: nn.Module) -> int:
    """Parameters that are not zero."""
    return sum(int(p.count_nonzero()) for p in model.parameters())


def said(row: Row) -> str:
    what = f"{row['net']:18} {row['recipe'][:90]:90}"
    if "refused" in row:
        return f"{what} refused: {row['refused'][:100]}"
    fall = row["accuracy"]["drop"]
    return f"{what} {fall[0]:6.2f} points {row['bytes']['coded']:9,} bytes {row['seconds']:6.1f} s"


if __name__ == "__main__":
    sys.exit(main())
