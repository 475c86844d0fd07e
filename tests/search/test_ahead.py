"""Trials that run ahead on a Ray cluster: the search finds what it finds alone, whatever happens there."""

import os
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tersor import Finetune, Task, digits, run
from tersor.core.state import State, start
from tersor.errors import MissingError, TaskError
from tersor.search import plan
from tersor.search.ahead import RayWorkers, own_modules
from tersor.search.compress import compress
from tersor.search.trials import Trial
from tersor.steps import Entropy, Quantize, Rdoq, Slim
from tests.search.told import Told

RAY = find_spec("ray") is not None


class Own(nn.Module):
    """A class of this file, which workers cannot import."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 32), nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.second(self.first(x.flatten(1)).relu())
        return out


class Dies(Own):
    """Ends the process if it runs in a worker."""

    def __init__(self) -> None:
        super().__init__()
        self.here = os.getpid()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if os.getpid() != self.here:
            os._exit(1)
        return super().forward(x)


@pytest.fixture(scope="module")
def task() -> Task:
    return digits()


@pytest.fixture(scope="module")
def given(task: Task) -> State:
    torch.manual_seed(0)
    return start(run(Own(), Finetune(epochs=5, lr=0.01), task).model())


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "BITS", (8.0, 3.0, 2.0))
    monkeypatch.setattr(plan, "KEEPS", (0.5,))
    monkeypatch.setattr(plan, "TRAINED", (1.0,))


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False)
    yield
    ray.shutdown()


def workers(given: State, task: Task, folder: Path, told: Told) -> RayWorkers:
    def place(trial: Trial) -> Path:
        return folder / trial.name

    return RayWorkers(2, given=given, task=task, seed=0, folder=place, observer=told)


def test_the_users_own_modules_are_sent_along(given: State, task: Task) -> None:
    assert [module.__name__ for module in own_modules(given, task)] == [__name__]


@pytest.mark.skipif(RAY, reason="Ray is installed")
def test_without_ray_the_extra_is_named(given: State, task: Task, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"tersor\[ray\]"):
        compress(given, task, "drop<=3", tmp_path, workers=2)


@pytest.mark.extra
@pytest.mark.usefixtures("cluster", "few")
def test_a_search_with_workers_finds_what_it_finds_alone(given: State, task: Task, tmp_path: Path) -> None:
    rows: list[Any] = []
    for count in (0, 2):
        _, facts = compress(given, task, "drop<=3", tmp_path / str(count), epochs=2, lr=0.01, workers=count)
        keys = ("name", "drop", "nbytes", "why")
        rows.append([[row[key] for key in keys] for row in facts["search"]["trials"] if not row["why"]])
    assert rows[0] == rows[1]


@pytest.mark.extra
@pytest.mark.usefixtures("cluster")
def test_journals_come_back_and_give_the_same_state(given: State, task: Task, tmp_path: Path) -> None:
    told = Told()
    slim = Trial("slim", (Slim(keep=0.5, of="parameters"),))
    coded = Trial("coded", (Rdoq(bits=2.0), Entropy()), slim)
    other = Trial("other", (Quantize(),))
    ran = workers(given, task, tmp_path, told)
    ran.ask([coded.chain, other.chain])
    ran.take(slim)  # which is part of a chain
    assert {path.parent.name for path in tmp_path.rglob("head.json")} == {"journal"}
    state = given
    for trial in coded.chain:
        state = run(state, list(trial.steps), task, journal=tmp_path / trial.name / "journal", resume=True)
    alone = run(run(given, list(slim.steps), task), list(coded.steps), task)
    assert state.digest == alone.digest
    ran.ask([])  # other is not needed any more
    assert not ran.flying
    ran.settle()
    ran.close()
    assert not told.messages


@pytest.mark.extra
@pytest.mark.usefixtures("cluster")
def test_a_worker_that_dies_is_said_and_the_trial_runs_here(task: Task, tmp_path: Path) -> None:
    told = Told()
    ran = workers(start(Dies(), task), task, tmp_path, told)
    trial = Trial("slim", (Slim(keep=0.5, of="parameters"),))
    ran.ask([trial.chain])
    ran.take(trial)
    (message,) = told.messages
    assert message.startswith("slim: its worker failed")
    assert not (tmp_path / "slim").exists()
    ran.close()


@pytest.mark.extra
@pytest.mark.usefixtures("cluster")
def test_what_is_stopped_leaves_nothing_behind(given: State, task: Task, tmp_path: Path) -> None:
    ran = workers(given, task, tmp_path, Told())
    before = {path.name for path in Path(tempfile.gettempdir()).glob("tersor-ahead-*")}
    ran.ask([Trial("long", (Finetune(epochs=10_000),)).chain])
    began = time.monotonic()
    while {path.name for path in Path(tempfile.gettempdir()).glob("tersor-ahead-*")} == before:
        assert time.monotonic() < began + 60
        time.sleep(0.05)
    ran.ask([])
    ran.settle()
    while {path.name for path in Path(tempfile.gettempdir()).glob("tersor-ahead-*")} != before:
        assert time.monotonic() < began + 90  # a busy machine ends a process late
        time.sleep(0.05)
    ran.close()


@pytest.mark.extra
def test_a_task_that_cannot_be_sent_is_named_before_anything_runs(given: State, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    lock = threading.Lock()

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        with lock:
            return nn.functional.cross_entropy(output, target)

    own = Task("locked", evaluate=[(torch.ones(4, 64), torch.arange(4))], loss=loss)
    with pytest.raises(TaskError, match="cannot be sent"):
        workers(given, own, tmp_path, Told())


@pytest.mark.extra
@pytest.mark.usefixtures("cluster")
def test_more_threads_than_cores_wait_for_nothing(given: State, task: Task, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(8)
    try:
        ran = workers(given, task, tmp_path, told := Told())
        trial = Trial("slim", (Slim(keep=0.5, of="parameters"),))
        ran.ask([trial.chain])
        ran.take(trial)
        assert (tmp_path / "slim" / "journal").exists(), told.messages
        ran.close()
    finally:
        torch.set_num_threads(threads)
