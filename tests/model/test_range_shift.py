"""Range shift: data of another scale or place is noticed, another sample of the same data is not."""

import torch
from torch import Tensor, nn

from tersor.model.observe import Range, ranges_of, values_of
from tersor.model.range_shift import unlike
from tersor.model.task import Task


class Net(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x + 0.0).relu()


NAMES = ["/add:0", "/relu:0"]


def normal(count: int, seed: int) -> Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))


def shifted(calibration: Tensor) -> list[str]:
    task = Task(evaluate=[(calibration, None)], calibrate=[calibration], train=[(normal(20_000, 1), 0)])
    training = values_of(Net(), task, NAMES, data="train")
    trained: dict[str, Range] = {name: values.range() for name, values in training.items()}  # type: ignore[misc]
    return unlike(ranges_of(Net(), task, NAMES), trained)


def test_another_sample_is_alike_and_other_data_is_not() -> None:
    assert shifted(normal(100, 0)) == []
    found = shifted(normal(100, 0) * 100)  # images from 0 to 255 and not normalized
    assert sorted(text.split(": its values are ")[0] for text in found) == NAMES
    assert all(text.endswith("%") and "on calibration data and" in text for text in found)
    assert len(shifted(normal(100, 0) - 20)) == 2
    assert len(shifted(normal(100, 0) * 0.1)) == 2


def test_ranges_of_zeros_and_channels() -> None:
    zero, one = (torch.full((2,), end, dtype=torch.float64) for end in (0.0, 1.0))
    assert unlike({"a": (zero, zero)}, {"a": (zero, zero)}) == []
    assert len(unlike({"a": (zero, zero)}, {"a": (zero, one)})) == 1
    assert unlike({"a": (zero, one)}, {"b": (zero, one * 9)}) == []
