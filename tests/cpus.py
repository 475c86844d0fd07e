"""All golden files and all coders, compiled as for other processors: python tests/cpus.py [--jobs 2]

Each processor of the table has processes of its own, told to numba by the environment, and an empty cache of
compiled loops. There golden files are read, vectors are compared with single states, and every coder writes,
on all processors the same. Only compiled loops are those of another processor: numpy and torch see the real
one. What the real one lacks cannot run, and is left out.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tersor.coders.rans.cpu_loops import VARIANT, VARIANTS

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("tests/io/test_golden.py", "tests/coders/test_coder_golden.py", "tests/coders/test_wide.py")
COMMANDS = (("-m", "pytest", "-p", "no:cacheprovider", *TESTS), ("tests/coders/every_stream.py",))


class Cpu(NamedTuple):
    """How numba is told of a processor, and which of VARIANTS rANS then takes."""

    variant: str
    settings: dict[str, str]


def named(name: str) -> dict[str, str]:
    """A processor with the features that its name implies, and no others."""
    return {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": ""}


CPUS = {  # the one at hand first: what the others write is compared with it
    f"this one ({VARIANT})": Cpu(VARIANT, {}),
    "AVX2": Cpu("AVX2", named("haswell")),
    "SSE2": Cpu("any", named("generic")),  # and where this one is no x86, the least of its kind
}


def runs_here(cpu: Cpu) -> bool:
    return list(VARIANTS).index(cpu.variant) >= list(VARIANTS).index(VARIANT)


class Outcome(NamedTuple):
    seconds: float
    fault: str  # the end of what was said, or nothing
    digests: dict[str, str]  # of each stream


def run(cpu: Cpu) -> Outcome:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | cpu.settings | {"NUMBA_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
        found = []
        for command in COMMANDS:
            done = subprocess.run(
                (sys.executable, *command),
                cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode:
                words = done.stderr[:3000] + done.stdout[-3000:]  # a crash says why first, pytest last
                fault = f"python {' '.join(command)}: exit status {done.returncode}\n{words}"
                return Outcome(time.perf_counter() - start, fault, {})
            found.append(done.stdout)
    streams = json.loads(found[-1])
    used = streams["variant"]
    fault = "" if used == cpu.variant else f"rANS uses the variant {used}, not {cpu.variant}"
    return Outcome(time.perf_counter() - start, fault, streams["digests"])


def differing(found: dict[str, str], expected: dict[str, str]) -> str:
    names = [name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)]
    return f"{len(names)} streams are not those of the first, as {min(names)!r}" if names else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="how many processors at a time")
    chosen = {name: cpu for name, cpu in CPUS.items() if runs_here(cpu)}
    for name in CPUS.keys() - chosen.keys():
        print(f"{name}: left out, this processor has no such instructions")
    with ThreadPoolExecutor(parser.parse_args().jobs) as pool:
        outcomes = dict(zip(chosen, pool.map(run, chosen.values()), strict=True))
    expected = next(iter(outcomes.values())).digests
    faults = {name: found.fault or differing(found.digests, expected) for name, found in outcomes.items()}
    for name, fault in faults.items():
        said = fault or f"golden files are read, {len(expected)} streams are written and read as they must be"
        print(f"{name}, {outcomes[name].seconds:.0f} s: {said}")
    return int(any(faults.values()))


if __name__ == "__main__":
    sys.exit(main())
