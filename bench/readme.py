"""README: what `make demo` printed, written into README.md from the report of that run.

python bench/readme.py [out/demo/report.json]        make readme runs the demo first
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import sys
from pathlib import Path

from tersor.demo import report
from tersor.report.console import show

ROOT = Path(__file__).resolve().parent.parent
README, REPORT = ROOT / "README.md", ROOT / "out" / "demo" / "report.json"
BLOCK = re.compile(r"(```text\n)(.*?)(```\n)", re.S)  # the one block of plain text


def printed(path: Path) -> str:
    """What `tersor demo` printed into a pipe when it wrote this report."""
    facts = json.loads(path.read_text())
    with contextlib.redirect_stdout(io.StringIO()) as out:
        show(report(facts))
    return "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())


def page(text: str, block: str) -> str:
    """A page with its block of plain text replaced. ValueError if it does not have exactly one."""
    if (count := len(BLOCK.findall(text))) != 1:
        raise ValueError(f"README.md has {count} blocks of plain text, and not the demo's alone")
    return BLOCK.sub(lambda found: f"{found[1]}{block}{found[3]}", text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("report", type=Path, nargs="?", default=REPORT)
    README.write_text(page(README.read_text(), printed(parser.parse_args(argv).report)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
