"""TensorBatches: a DataLoader over tensors in memory that takes a whole batch with one index.

batch = (x[i], y[i], ...), i = the next B of a permutation       one gather a batch, no collating of samples
Cost: 60,000 images of 28 x 28 in batches of 128 take about 0.1 s a pass. To the outside it is an ordinary
DataLoader with a batch size, so Accelerate shards it over processes as any other.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from tersor.errors import TaskError
from tersor.model.batches import shapes


class Rows(TensorDataset):
    """Tensors of N rows each. A list of indices gives the batch of these rows at once."""

    # A DataLoader calls this in place of one __getitem__ a sample. It is annotated as a list of samples; what
    # comes back goes to collate_fn as it is.
    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        return tuple(tensor[indices] for tensor in self.tensors)


class TensorBatches(DataLoader):
    """Batches of tensors that all have N as their first dimension; the target comes last."""

    def __init__(self, *tensors: Tensor, batch: int = 128, shuffle: bool = False, drop_last: bool = False):
        """`batch` samples a batch; `shuffle` draws a new order from torch's global generator in each pass.

        `drop_last` leaves out a last batch that is short. TaskError for tensors that do not belong together.
        """
        if not tensors or not all(isinstance(item, Tensor) and item.ndim for item in tensors):
            raise TaskError(f"TensorBatches: it takes tensors with samples in rows, got {shapes(tensors)}")
        if len({len(item) for item in tensors}) > 1:
            raise TaskError(f"TensorBatches: the tensors differ in their number of rows: {shapes(tensors)}")
        if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1:
            raise TaskError(f"TensorBatches: batch={batch!r}, but it is a number of samples, 1 or more")
        rows = Rows(*tensors)
        # An empty set has no order, and torch refuses to draw one.
        super().__init__(rows, batch, shuffle and len(rows) > 0, drop_last=drop_last, collate_fn=as_is)


def as_is(batch: Any) -> Any:
    """Nothing to collate: the data set returned a whole batch."""
    return batch
