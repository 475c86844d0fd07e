"""kill -9 in the middle of tersor run, then --resume: the same file as without the kill."""

import json
import signal
import time
from pathlib import Path

import forks
from command_line import Command

import tersor as package

STEPS = "prune keep=0.4 entropy finetune epochs=40 lr=0.01 cluster entropy"
RUN = f"run mine.py:net --task mine.py:task --json --out {{}} {{}} {STEPS}"
PATIENCE = 120  # seconds that a loaded machine may take to reach the training


def start(words: str) -> forks.Child:
    return forks.start(["-m", "tersor", *words.split()])


def test_a_killed_run_resumes(tersor: Command) -> None:
    tersor("--version")  # makes the folder
    killed, journal = start(RUN.format("killed", "")), Path("killed/journal")
    until = time.monotonic() + PATIENCE
    while not list(journal.glob("training-*")) and killed.poll() is None and time.monotonic() < until:
        time.sleep(0.001)
    assert killed.kill() == -signal.SIGKILL  # neither finished nor failed by itself
    assert not Path("killed/model.tersor").exists()

    groups = list(journal.glob("0*"))

    first, second = (
        json.loads(forks.run(["-m", "tersor", *RUN.format(*words).split()]).stdout)
        for words in (("whole", ""), ("killed", "--resume"))
    )
    assert groups  # groups in the journal were read, not computed again
    assert not journal.exists()
    for key in ("base", "result", "ledger"):
        assert first[key] == second[key]
    a, b = (package.load(f"{name}/model.tersor") for name in ("whole", "killed"))
    assert {n: f.digest for n, f in a.forms.items()} == {n: f.digest for n, f in b.forms.items()}
    assert Path("whole/recipe.lock.yaml").read_bytes() == Path("killed/recipe.lock.yaml").read_bytes()
