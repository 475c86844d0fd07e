"""Loader: each sample once an epoch, the caller's seed determines the order, processes share the batches."""

import os
import pickle
import socket
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from tersor.errors import TaskError
from tersor.model.loader import TensorBatches


def rows(batches: Any) -> list[list[int]]:
    return [x.tolist() for x, _ in batches]


def make(n: int, **settings: Any) -> TensorBatches:
    x = torch.arange(n)
    return TensorBatches(x, -x, **settings)


@given(st.integers(0, 40), st.integers(1, 12), st.booleans(), st.booleans())
def test_an_epoch_is_every_sample_once(n: int, batch: int, shuffle: bool, drop_last: bool) -> None:
    loader = make(n, batch=batch, shuffle=shuffle, drop_last=drop_last)
    found = list(loader)
    assert len(found) == len(loader)
    assert all(torch.equal(x, -y) for x, y in found), "inputs and targets stay together"
    flat = [i for part in rows(found) for i in part]
    assert len(flat) == (n - n % batch if drop_last else n)
    assert len(set(flat)) == len(flat)
    assert set(flat) <= set(range(n))
    if not shuffle:
        assert flat == list(range(len(flat)))
    assert all(len(x) == batch for x, _ in found[:-1])


def test_the_callers_seed_determines_the_order() -> None:
    loader = make(30, batch=7, shuffle=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first, second = rows(loader), rows(loader)
        torch.manual_seed(1)
        assert rows(loader) == first
    assert first != second
    assert sorted(sum(first, [])) == sorted(sum(second, []))


def test_it_is_a_data_loader_that_pickles() -> None:
    loader = make(9, batch=4)
    assert isinstance(loader, DataLoader)
    assert rows(pickle.loads(pickle.dumps(loader))) == rows(loader)


@pytest.mark.parametrize(
    ("tensors", "settings", "words"),
    [
        ((), {}, "it takes tensors"),
        (([1, 2],), {}, "it takes tensors"),
        ((torch.zeros(()),), {}, "samples on axis 0"),
        ((torch.zeros(3), torch.zeros(4)), {}, r"float32 \[3\], float32 \[4\]"),
        ((torch.zeros(3),), {"batch": 0}, "batch=0"),
        ((torch.zeros(3),), {"batch": 2.0}, "batch=2.0"),
        ((torch.zeros(3),), {"batch": True}, "batch=True"),
    ],
)
def test_wrong_tensors_and_settings_are_refused(tensors: Any, settings: Any, words: str) -> None:
    with pytest.raises(TaskError, match=words):
        TensorBatches(*tensors, **settings)


def test_one_process_of_accelerate_sees_the_same_batches() -> None:
    prepared = Accelerator(cpu=True).prepare(make(30, batch=7, shuffle=True))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        found = rows(prepared)
        torch.manual_seed(1)
        assert rows(make(30, batch=7, shuffle=True)) == found


WORKER = """
import torch
from accelerate import Accelerator
from tersor.model.loader import TensorBatches
accelerator = Accelerator(cpu=True)
torch.manual_seed(accelerator.process_index)  # Accelerate has to make the processes agree on one order
x = torch.arange(103)
loader = accelerator.prepare(TensorBatches(x, -x, batch=10, shuffle=True))
epochs = [[a.tolist() for a, b in loader if torch.equal(a, -b)] for _ in range(2)]
print([accelerator.num_processes, len(loader), epochs])
accelerator.wait_for_everyone()
torch.distributed.destroy_process_group()  # otherwise the process that exits first makes the other fail
"""


def test_two_processes_share_the_batches() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = os.environ | {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
    }
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER],
            env=shared | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    printed = [eval(worker.communicate(timeout=120)[0]) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    assert [item[:2] for item in printed] == [[2, 6], [2, 6]]  # 11 batches, padded to 12: 6 each
    for epoch in range(2):
        one, two = (item[2][epoch] for item in printed)
        assert [len(batch) for batch in one + two] == [10] * 12
        counts = Counter(sum(one + two, []))
        assert set(counts) == set(range(103)), "every sample is seen by one process or the other"
        assert sum(counts.values()) - 103 == 17, "only the padding of the last batches repeats samples"
        assert not set(sum(one[:-1], [])) & set(sum(two[:-1], []))
    assert printed[0][2][0] != printed[0][2][1], "each epoch has another order"
