"""Tables: every architecture of the zoo before and after: accuracy, bytes, milliseconds.

python bench/tables.py [--quick] [--weights FOLDER] [--out FOLDER] [NAME ...]      make tables
train      tersor run zoo:NAME --recipe zoo:NAME               or FOLDER/NAME.safetensors, if it is there
compress   tersor run zoo:NAME --recipe zoo:NAME:small         from these weights, which teach it
measure    tersor compare float.onnx small.onnx --latency      both files score all test scenes in ONNX
                                                               Runtime, and take turns there, one thread
peer       the same of NNCF's int8 file of float.onnx: tables_peer.py, with TERSOR_INTEGER_PEERS
Each step is a process of its own and is kept in OUT, so that a killed run continues. A finished architecture
replaces its line of zoo/measured.jsonl; docs/tables.md is written from that file. --quick trains for a
fraction of the epochs, and its rows say so; they never replace rows of a whole training.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from dataclasses import fields
from operator import itemgetter
from pathlib import Path
from typing import Any

import tables_page
from rows_file import ZOO_ROWS, Row, processor, record, shorter
from tables_peer import PEERS, beside

from tersor.errors import TersorError
from tersor.files import write_text
from tersor.pipeline import JOURNAL, LOCK, MODEL, REPORT
from tersor.resolve import resolve_recipe
from tersor.steps import read_recipe
from tersor.steps.recipe_text import dump
from tersor.zoo.architectures import ZOO, entry

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "out" / "tables"
QUICK = 0.02  # share of the epochs
FOLDER = os.environ.get("FASHION_MNIST", "")
SECONDS = "seconds.txt"  # of processor time, beside a run's report


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ZOO)}")
    parser.add_argument("--quick", action="store_true", help="train for 2 %% of the epochs")
    parser.add_argument("--weights", type=Path, metavar="FOLDER", help="NAME.safetensors of trained networks")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FOLDER", help="what the steps write")
    options = parser.parse_args(argv)
    failed = []
    for name in options.names or ZOO:
        try:
            entry(name)
            record(measured(name, options), ZOO_ROWS, itemgetter("name"))
        except (TersorError, subprocess.CalledProcessError) as error:
            print(f"tables: {name}: {error}", file=sys.stderr, flush=True)
            failed.append(name)
        tables_page.write()
    return 1 if failed else 0


def measured(name: str, options: argparse.Namespace) -> Row:
    """The row of an architecture: trained and compressed, if it was not, and compared."""
    out = options.out / (f"{name}-quick" if options.quick else name)
    out.mkdir(parents=True, exist_ok=True)
    task = f"zoo:{name}" + (f":{FOLDER}" if FOLDER else "")
    train, small = (recipe(f"zoo:{name}{end}", out, options.quick) for end in ("", ":small"))
    weights = options.weights / f"{name}.safetensors" if options.weights else None
    given = weights is not None and weights.exists()
    if weights is None or not given:
        weights = out / "float.safetensors"
        run(f"zoo:{name}", task, out / "float", train)
        if not weights.exists():
            tersor("unpack", out / "float" / MODEL, "-o", weights)
    run(f"zoo:{name}", task, out / "small", small, "--weights", weights, "--tiny")
    before, after = out / "float.onnx", out / "small" / "model.onnx"
    if not before.exists():
        tersor("export", weights, "--model", f"zoo:{name}", "--task", task, "-o", before)
    found = compared(before, after, task)
    peer = beside(before, after, task, out / "peer", compared) if PEERS else None
    return {
        "name": name, "quick": options.quick, "metric": found["metric"], "accuracy": found["accuracy"],
        "latency": found["latency"], "peer": peer,
        "bytes": {
            "float": weights.stat().st_size, "packed": (out / "small" / MODEL).stat().st_size,
            "onnx": after.stat().st_size,
        },
        "trained": "weights given" if given else steps_in(out / "float" / LOCK),
        "compressed": steps_in(out / "small" / LOCK),
        "seconds": {word: seconds(out / word) for word in ("float", "small")},
        "machine": f"{processor()}, load {os.getloadavg()[1]:.1f} of {os.cpu_count()}",
    }  # fmt: skip


def recipe(words: str, out: Path, quick: bool) -> Path:
    """The recipe of these words as a file, with few epochs if `quick`."""
    found = resolve_recipe(Path(words), None)
    if quick:
        found = shorter(found, QUICK)
    path = out / ("small.yaml" if words.endswith(":small") else "float.yaml")
    write_text(path, dump(found.to_json()))
    return path


def run(model: str, task: str, out: Path, given: Path, *words: str | Path) -> None:
    """`tersor run`, unless it is finished; one that was killed continues. Its processor time is kept."""
    if (out / REPORT).exists() and not (out / JOURNAL).exists():
        return
    resume = ["--resume"] if (out / JOURNAL).exists() else []
    before = spent()
    tersor("run", model, "--task", task, "--out", out, "--recipe", given, *words, *resume)
    if not resume:  # of a run that was killed it is not known
        write_text(out / SECONDS, f"{spent() - before:.0f}\n")


def compared(before: Path, after: Path, task: str, runtime: str = "onnxruntime") -> Row:
    """What `tersor compare` says of two files."""
    words = ("--task", task, "--latency", "--runtime", runtime, "--json")
    found: Row = json.loads(tersor("compare", before, after, *words))
    return found


def tersor(*words: str | Path) -> str:
    """What `tersor` prints. CalledProcessError if it fails; its progress goes to the terminal."""
    command = [sys.executable, "-m", "tersor", *map(str, words)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def spent() -> float:
    """Seconds of processor time of all processes that were started and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def seconds(out: Path) -> int | None:
    return int((out / SECONDS).read_text()) if (out / SECONDS).exists() else None


def steps_in(path: Path) -> str:
    """The steps of a recipe, with the settings that are no defaults."""
    return " ".join(
        " ".join([step.name, *(f"{key}={value}" for key, value in changed(step).items())])
        for step in read_recipe(path).steps
    )


def changed(step: Any) -> dict[str, Any]:
    plain = type(step)()
    return {item.name: value for item in fields(step)
            if (value := getattr(step, item.name)) != getattr(plain, item.name)}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
