"""TensorBatches: a DataLoader over tensors in memory that takes a whole batch with one index.

batch = (x[i], y[i], ...), i = the next B of a permutation       one gather a batch, no collating of samples
Cost: 60,000 images of 28 x 28 in batches of 128 take about 0.1 s a pass. It is a real DataLoader whose
sampler is a BatchSampler, the formulation that Accelerate shards over processes batch by batch.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, TensorDataset

from tersor.errors import TaskError
from tersor.model.batches import shapes


class TensorBatches(DataLoader):
    """Batches of tensors that all have N as their first dimension; the target comes last."""

    def __init__(self, *tensors: Tensor, batch: int = 128, shuffle: bool = False, drop_last: bool = False):
        """`batch` samples a batch; `shuffle` draws a new order from torch's global generator in each pass.

        `drop_last` leaves out a last batch that is short. TaskError for tensors that do not belong together.
        """
        if not tensors or not all(isinstance(item, Tensor) and item.ndim for item in tensors):
            raise TaskError(f"TensorBatches: it takes tensors with samples in rows, got {shapes(tensors)}")
        if len({len(item) for item in tensors}) > 1:
            raise TaskError(
                f"TensorBatches: the tensors differ in their number of samples: {shapes(tensors)}"
            )
        if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1:
            raise TaskError(f"TensorBatches: batch={batch!r}, but it is a number of samples, 1 or more")
        data = TensorDataset(*tensors)
        # RandomSampler refuses an empty set; an empty one has no order to draw.
        order = RandomSampler(data) if shuffle and len(data) else SequentialSampler(data)
        super().__init__(
            data,
            sampler=BatchSampler(order, batch, drop_last),
            batch_size=None,  # the sampler's batches are indices already
            collate_fn=as_is,
        )


def as_is(batch: Any) -> Any:
    """Nothing to collate: the data set returned a whole batch."""
    return batch
