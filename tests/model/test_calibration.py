"""Calibration batches that no working model gets: one damaged number, nothing but one number, no sample."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import tersor
from tersor.errors import TaskError
from tersor.model.calibration import Seen, Sound


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)).eval()


def batches(count: int = 4) -> list[Tensor]:
    return [*torch.randn(8 * count, 3, 6, 6, generator=torch.Generator().manual_seed(1)).split(8)]


def task_of(*given: Tensor) -> tersor.Task:
    return tersor.Task("t", calibrate=[(x,) for x in given], evaluate=[(given[0], torch.zeros(8).long())])


STEPS = {
    "integers": tersor.Quantize(activations=8), "gptq": tersor.Quantize(bits=4, rounding="gptq"),
    "slim": tersor.Slim(keep=0.6), "prune": tersor.Prune(keep=0.5),
}  # fmt: skip


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("name", STEPS)
def test_a_damaged_number_does_not_decide_the_network(name: str, at: int) -> None:
    given = batches()
    given[at][3, 1, 2, 2] = 1e10
    with pytest.raises(TaskError, match=rf"sample {8 * at + 3} of the calibration .* 1e\+10, .* none above"):
        tersor.run(net(), STEPS[name], task_of(*given))


def test_grids_need_more_of_their_data_than_refits_do() -> None:
    given = batches()
    given[1][0, 0, 0, 0] = 1e6
    with pytest.raises(TaskError, match=r"a number of 1e\+06"):
        tersor.run(net(), STEPS["integers"], task_of(*given))
    assert tersor.run(net(), STEPS["prune"], task_of(*given)).model()


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_one_number_shows_no_range(value: float) -> None:
    blank = task_of(torch.full((8, 3, 6, 6), value))
    with pytest.raises(TaskError, match=f"all numbers in the calibration batches are {value:g}, so they"):
        tersor.run(net(), STEPS["integers"], blank)
    assert tersor.run(net(), tersor.Fold(), blank).model()  # needs shapes alone


def test_a_batch_without_samples_changes_nothing() -> None:
    one, two = batches(2)
    whole = tersor.run(net(), STEPS["integers"], task_of(one, two))
    with_hole = tersor.run(net(), STEPS["integers"], task_of(one, one[:0], two))
    assert whole.ledger.digest == with_hole.ledger.digest


def test_a_batch_of_another_shape_is_an_error_of_the_task() -> None:
    with pytest.raises(TaskError, match=r"batches do not fit the model .* \[8, 4, 6, 6\]"):
        tersor.run(net(), STEPS["integers"], task_of(*batches(2), torch.randn(8, 4, 6, 6)))


def test_masks_and_inputs_of_other_units_are_sound() -> None:
    mask = torch.zeros(4, 5)
    mask[0, 3:] = torch.finfo(torch.float32).min  # padding of one sample
    small, large = torch.rand(4, 5), 1e8 * torch.rand(4, 5)

    def given() -> Iterator[tuple[Tensor, ...]]:
        yield small, mask, large, torch.tensor(float("inf")), torch.arange(4)

    sound = Sound(list(given()), lambda batch: batch, "t")
    assert len(list(sound)) == len(sound) == 1
    large[2] *= 1e7
    with pytest.raises(TaskError, match="sample 2"):
        list(sound)


def test_a_mask_is_not_damaged() -> None:
    """Masks of -3.4e38, as an argument of floats, are in some samples and not in others."""
    mask = torch.zeros(8, 4)
    mask[0, 1:], mask[1:] = torch.finfo(torch.float32).min, -1.0
    seen = Seen(lambda batch: batch, "task")
    seen.add((mask,))
    seen.refuse_damaged()


def test_tokens_with_a_mask_of_ones_are_not_blank() -> None:
    seen = Seen(lambda batch: batch, "task")
    seen.add((torch.randint(30, (4, 6)), torch.ones(4, 6)))
    seen.refuse_blank()
    seen = Seen(lambda batch: batch, "task")
    seen.add((torch.ones(4, 6),))
    with pytest.raises(TaskError, match="all numbers in the calibration batches are 1"):
        seen.refuse_blank()
