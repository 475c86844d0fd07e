"""bench/trust.py: every file that was tried is in the figures, also if the worker that tried it died."""

from pathlib import Path

DIES = """
import json, os, sys
from pathlib import Path
folder, first, last = Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
(folder / "case.tersor").write_bytes(b"")
for number in range(first, last):
    (folder / "at").write_text(str(number))
    if number == 7:
        os._exit(3)
print(json.dumps({"cut refused": 1, "cut read": last - first - 1}))
"""


def test_files_of_a_batch_whose_worker_died_are_faults(bench, tmp_path: Path) -> None:
    script = tmp_path / "dies.py"
    script.write_text(DIES)
    figure, fault = bench("trust").fuzzed(20, 1, tmp_path / "keep", str(script))
    assert figure == "20 tried: 1 refused, 11 read, 8 faults"  # the seven before the one that killed it, too
    assert fault


def test_no_fault_without_a_death(bench, tmp_path: Path) -> None:
    script = tmp_path / "lives.py"
    script.write_text(DIES.replace("== 7", "== 70"))
    assert bench("trust").fuzzed(20, 1, tmp_path / "keep", str(script)) == (
        "20 tried: 1 refused, 19 read, 0 faults", False,
    )  # fmt: skip
