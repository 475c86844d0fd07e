"""Loader: TensorBatches, a DataLoader over tensors in memory that takes a whole batch with one index.

batch = (x[i], y[i], ...), i = the next B of a permutation       one gather a batch, no collating of samples
Cost: 60,000 images of 28 x 28 in batches of 128 take about 0.1 s a pass. It is a DataLoader with a batch
size, so Accelerate shards it over processes like any other.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from tersor.errors import TaskError
from tersor.model.batches import shapes


class Rows(TensorDataset):
    """Tensors of N rows each. A list of indices gives the batch of these rows at once."""

    # A DataLoader calls this once a batch instead of __getitem__ once a sample. torch annotates the result as
    # a list of samples, but hands any result to collate_fn.
    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        return tuple(tensor[indices] for tensor in self.tensors)


class TensorBatches(DataLoader):
    """Batches of tensors that all have N samples on axis 0; the target comes last."""

    def __init__(self, *tensors: Tensor, batch: int = 128, shuffle: bool = False, drop_last: bool = False):
        """`batch` samples a batch; `shuffle` draws a new order from torch's global generator in each pass.

        `drop_last` leaves out a short last batch. TaskError if the tensors have different numbers of samples.
        """
        if not tensors or not all(isinstance(item, Tensor) and item.ndim for item in tensors):
            raise TaskError(f"TensorBatches: it takes tensors with samples on axis 0, got {shapes(tensors)}")
        if len({len(item) for item in tensors}) > 1:
            raise TaskError(f"TensorBatches: the tensors differ in their number of rows: {shapes(tensors)}")
        if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1:
            raise TaskError(f"TensorBatches: batch={batch!r}, but it is a number of samples, 1 or more")
        rows = Rows(*tensors)
        # torch refuses to shuffle an empty set.
        super().__init__(rows, batch, shuffle and len(rows) > 0, drop_last=drop_last, collate_fn=as_is)


def as_is(batch: Any) -> Any:
    """The batch unchanged: the data set has returned a whole batch, so there is nothing to collate."""
    return batch
