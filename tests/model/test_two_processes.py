"""Two processes: training gives the same weights in both, with about the accuracy of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import two_processes

pytestmark = pytest.mark.wide  # both processes take ten seconds


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """The results of both processes, and the folder with the journal of the first."""
    folder = tmp_path_factory.mktemp("two")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", "localhost:0", two_processes.__file__, str(folder),
    ]  # fmt: skip
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1))
    return first, second, folder


@pytest.mark.parametrize("kind", ["loader", "list"])
def test_both_end_with_the_same_forms(both: Any, kind: str) -> None:
    first, second, _ = both
    assert first[kind] == second[kind]


@pytest.mark.parametrize("kind", ["loader", "list"])
def test_steps_and_accuracy_are_as_expected(both: Any, kind: str) -> None:
    """Two processes take half as many steps of twice the batch; the accuracy is near that of one."""
    alone = two_processes.facts(kind, two_processes.compress(kind, None))
    steps = two_processes.TRAIN // two_processes.BATCH
    assert alone["steps"] == [6 * steps, 3 * steps, 2 * steps, steps]
    assert both[0][kind]["steps"] == [3 * steps, 3 * steps // 2, steps, steps // 2]
    assert alone["accuracy"] > 0.75
    assert both[0][kind]["accuracy"] == pytest.approx(alone["accuracy"], abs=0.08)


def test_one_of_them_writes_the_journal(both: Any) -> None:
    """The journal is complete: a resumed run has nothing left to do."""
    first, _, folder = both
    resumed = two_processes.compress("loader", folder / "journal-loader", resume=True)
    assert {name: form.digest for name, form in resumed.forms.items()} == first["loader"]["forms"]
    assert resumed.ledger.digest == first["loader"]["ledger"]
