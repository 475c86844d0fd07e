"""Trust: how many damaged files, kills and dtypes were tried, for docs/trust.md.

python bench/trust.py [--files 20000] [--inputs 10000] [--kills 50] [--write]

files     damaged and forged .tersor files (tests/fuzz.py); what is read is also shown and compared
inputs    damaged patches, safetensors files, pickles and recipes (tests/fuzz_inputs.py)
kills     kill -9 of a process that packs one of two files again and again, at a random moment
dtypes    each dtype through pack, verify, show, unpack, diff and patch, bit for bit
--write puts the figures into the page. Exit code 1 if anything was found.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import fuzz  # noqa: E402
import fuzz_inputs  # noqa: E402

from tersor.core.recipe import Recipe  # noqa: E402
from tersor.dtypes import NAMED  # noqa: E402
from tersor.io.container import load  # noqa: E402
from tersor.io.pack import pack  # noqa: E402
from tersor.io.patch.diff import diff  # noqa: E402
from tersor.io.patch.patch import patch  # noqa: E402
from tersor.io.unpack import unpack  # noqa: E402
from tersor.io.verify import verify  # noqa: E402
from tersor.report.show import shown, tables  # noqa: E402
from tersor.steps import Entropy  # noqa: E402

PAGE = ROOT / "docs" / "trust.md"
BEGIN, END = "<!-- figures: written by bench/trust.py -->", "<!-- end of figures -->"
VERBS = ("pack", "verify", "show", "unpack", "diff", "patch")
LOSSLESS = Recipe((Entropy(),))
PACKER = """
import itertools, sys
from tersor.core.recipe import Recipe
from tersor.io.pack import pack
from tersor.steps import Entropy
print("ready", flush=True)
for turn in itertools.count():
    pack(sys.argv[1 + turn % 2], sys.argv[3], Recipe((Entropy(),)))
"""


def fuzzed(files: int, seed: int, keep: Path, script: str | None) -> tuple[str, bool]:
    """(what became of mutated files, whether any was a finding). A file whose outcome is not known, since the
    worker died later in its batch, counts as a fault."""
    counts, _ = fuzz.run(files, seed, keep, say=lambda _: None, script=script)
    read = sum(n for word, n in counts.items() if word.endswith(" read"))
    refused = sum(n for word, n in counts.items() if word.endswith(" refused"))
    faults = files - refused - read
    return f"{files:,} tried: {refused:,} refused, {read:,} read, {faults:,} faults", faults > 0


def killed(count: int, folder: Path) -> tuple[str, bool]:
    """Kills of a packing process: the file must be one of the two complete ones, and nothing may be left."""
    rng, whole = random.Random(0), set()
    for seed, word in enumerate(("a", "b")):
        values = torch.randn(100_000, generator=torch.Generator().manual_seed(seed))
        save_file({"w": values}, folder / word)
        pack(folder / word, folder / f"{word}.tersor", LOSSLESS)
        whole.add((folder / f"{word}.tersor").read_bytes())
    out, survived = folder / "out.tersor", 0
    words = [sys.executable, "-c", PACKER, str(folder / "a"), str(folder / "b"), str(out)]
    for _ in range(count):
        with subprocess.Popen(words, stdout=subprocess.PIPE, env=dict(os.environ)) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(rng.uniform(0.0, 0.5))
            process.send_signal(signal.SIGKILL)
        survived += not out.exists() or out.read_bytes() in whole
    pack(folder / "a", out, LOSSLESS)  # the next process removes what killed ones left
    left = [path.name for path in folder.iterdir() if path.name.startswith(".")]
    return f"{count:,} tried: {survived:,} left a complete file, {len(left)} left parts", (
        survived < count or bool(left)
    )


def dtypes(folder: Path) -> tuple[str, bool]:
    """Every dtype through every verb."""
    good = sum(verbs(name, folder) for name in sorted(NAMED))
    total = len(NAMED) * len(VERBS)
    return f"{len(NAMED)} dtypes x {len(VERBS)} verbs: {good} of {total} exact", good < total


def verbs(name: str, folder: Path) -> int:
    """The verbs that keep a tensor of this dtype bit for bit."""
    bits = torch.arange(480, dtype=torch.int64).remainder(1 if name == "bool" else 120).to(torch.uint8)
    dtype, good = NAMED[name], 0
    old = bits.view(dtype).reshape(6, -1)
    new = bits.flip(0).contiguous().view(dtype).reshape(6, -1)
    for word, values in (("old", old), ("new", new)):
        save_file({"w": values}, folder / word)
        pack(folder / word, folder / f"{word}.tersor", LOSSLESS)
    good += same(load(folder / "old.tersor").state_dict()["w"], old)
    good += all(check.sound or "NaN" in check.text for check in verify(folder / "old.tersor"))
    good += bool(list(tables(shown(load(folder / "old.tersor"), folder / "old.tersor"))))
    unpack(folder / "old.tersor", folder / "again")
    good += same(load_file(folder / "again")["w"], old)
    good += diff(folder / "old.tersor", folder / "new.tersor", folder / "p").nbytes > 0
    patch(folder / "old.tersor", folder / "p", folder / "out")
    return good + ((folder / "out").read_bytes() == (folder / "new.tersor").read_bytes())


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have the same bits."""
    return a.dtype is b.dtype and torch.equal(
        a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8)
    )


def figures(options: argparse.Namespace) -> Iterator[tuple[str, str, bool]]:
    """(what, the figure, whether it is a fault)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        keep = options.keep
        yield "dtypes", *dtypes(folder)
        yield "kills while packing", *killed(options.kills, folder)
        yield "damaged and forged .tersor files", *fuzzed(options.files, options.seed, keep, None)
        yield (
            "damaged patches, weights, pickles, recipes",
            *fuzzed(options.inputs, options.seed, keep, fuzz_inputs.__file__),
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, default=Path("out/fuzz"), help="folder for files with faults")
    parser.add_argument("--write", action="store_true", help="put the figures into docs/trust.md")
    options = parser.parse_args()
    lines, faults = ["| what | figure |", "| --- | --- |"], 0
    for what, figure, fault in figures(options):
        print(f"{what}: {figure}", flush=True)
        lines.append(f"| {what} | {figure} |")
        faults += fault
    machine = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    lines.append(f"\nMeasured with torch {torch.__version__} on {machine}, seed {options.seed}.")
    if options.write:
        text = PAGE.read_text()
        before, rest = text.split(BEGIN)
        after = rest.split(END)[1]
        PAGE.write_text(f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n\n{END}{after}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
