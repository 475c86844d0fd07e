"""Run: every bench in order, one process each; then the targets that were met and missed.

python bench/run.py [--quick] [NAME ...]        NAME of deep_compression, distillation, ...
Separate processes give each bench its own threads and memory. Numbers go into bench/results.csv at once, and
bench/README.md is generated from it. The exit code is 1 only if a bench crashed: a missed target is a result.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import page
from table import read

FOLDER = Path(__file__).resolve().parent
# Name, and whether it takes minutes.
BENCHES = {
    "deep_compression": True,
    "penalized": True,
    "distillation": True,
    "quantization": True,
    "rounding": True,
    "recipes": True,
    "pruning": True,
    "lowrank": False,
    "factors": True,
    "compress": True,
    "coders": False,
    "bytes": True,
    "memory": False,
    "architectures": True,
    "slim": True,
    "slim_coverage": True,
    "slim_compose": True,
    "slim_minilm": True,
    "fold": True,
    "shorten": True,
    "integers": True,
    "imagenet_int8": True,
    "integers_low": True,
    "integers_slim": True,
    "integers_coverage": True,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHES)}; default: all")
    parser.add_argument("--quick", action="store_true", help="leave out what takes minutes")
    options = parser.parse_args(argv)
    if unknown := set(options.names) - BENCHES.keys():
        parser.error(f"no bench {', '.join(sorted(unknown))}; there are {', '.join(BENCHES)}")
    names = [name for name in options.names or BENCHES if not (options.quick and BENCHES[name])]
    crashed = [name for name in names if not finished(name)]
    page.write()
    summary(names, crashed)
    return 1 if crashed else 0


def finished(name: str) -> bool:
    """Run one bench. Returns whether it finished."""
    print(f"\n== {name}", flush=True)
    began = time.perf_counter()
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--record"]
    code = subprocess.run(command, check=False, cwd=FOLDER.parent).returncode
    print(f"== {name}: {time.perf_counter() - began:.0f} s{'' if code == 0 else f', crashed with {code}'}")
    return code == 0


def summary(names: list[str], crashed: list[str]) -> None:
    """Each target of the benches that were run."""
    print("\n== targets")
    ran = [row for row in read() if row.bench in names and row.bench not in crashed and row.target]
    for row in ran:
        verdict = "met" if row.met == "yes" else "NOT MET"
        what = f"{row.bench}, {row.subject}, {row.measure}"
        print(f"{verdict:8} {what:70} {row.value:>8} {row.unit:9} target {row.target}")
    met = sum(row.met == "yes" for row in ran)
    print(f"== {met} of {len(ran)} targets met" + (f"; crashed: {', '.join(crashed)}" if crashed else ""))


if __name__ == "__main__":
    sys.exit(main())
