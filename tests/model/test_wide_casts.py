"""Wide casts: a forward that asks for float32 by name runs in float64 while it is compared."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.core.run import run
from tersor.model.output_comparison import outputs
from tersor.model.task import Task
from tersor.steps import Slim

TOKENS, WIDTH, EPS = 100, 32, 1e-6


class Norm(nn.Module):
    """As language models write it: the mean of squares in float32, whatever comes in."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:  # [B, T, D]
        dtype, x = x.dtype, x.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
        return self.weight * x.to(dtype)


class Stream(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(TOKENS, WIDTH), nn.Linear(WIDTH, TOKENS, bias=False)
        self.norms = nn.ModuleList(Norm() for _ in range(3))
        self.up = nn.ModuleList(nn.Linear(WIDTH, 48) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(48, WIDTH) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=False):
            x = x + down(F.silu(up(norm(x))))
        return self.head(self.norms[2](x))


@pytest.fixture
def stream() -> tuple[Stream, Task]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        batches = [(torch.randint(0, TOKENS, (8, 16)), torch.randint(0, TOKENS, (8, 16))) for _ in range(2)]
        model = Stream().eval()
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(6 if weight.ndim == 2 else 1)  # outputs so large that rounding of float32 shows
        return model, Task("tokens", evaluate=batches, calibrate=batches, logits="classes")


def by_hand(model: Stream, ids: Tensor, kept: list[int]) -> Tensor:
    """The forward of these channels of the stream alone, in float64."""
    w = {name: value.detach().double() for name, value in model.state_dict().items()}

    def norm(x: Tensor, k: int) -> Tensor:
        return w[f"norms.{k}.weight"][kept] * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()

    x = w["tokens.weight"][ids][..., kept]
    for k in range(2):
        inner = F.silu(norm(x, k) @ w[f"up.{k}.weight"][:, kept].T + w[f"up.{k}.bias"])
        x = x + inner @ w[f"down.{k}.weight"][kept].T + w[f"down.{k}.bias"][kept]
    return norm(x, 2) @ w["head.weight"][:, kept].T


def test_channels_that_a_norm_in_float32_counts_can_be_cut(stream: tuple[Stream, Task]) -> None:
    model, task = stream
    step = Slim(
        keep=0.75, of="units", by="l1", exact=False, correct=False, where="tokens.weight,down*,head.weight"
    )
    result = run(model, step, task)
    kept = result.present("head.weight", 1)
    assert len(kept) < WIDTH
    ids = torch.arange(TOKENS).reshape(4, 25)
    torch.testing.assert_close(
        result.model()(ids).double(), by_hand(model, ids, [*kept]), rtol=1e-4, atol=1e-5
    )


def test_a_forward_in_float32_is_compared_in_float64(stream: tuple[Stream, Task]) -> None:
    model, task = stream
    (found, _) = outputs(copy.deepcopy(model), task, "double")
    wanted = by_hand(model, task.calibrate[0][0], [*range(WIDTH)])  # type: ignore[index]
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


class Spelled(nn.Module):
    """Every way to write a cast or a constant."""

    def __init__(self, way: Any):
        super().__init__()
        self.weight, self.way = nn.Parameter(torch.full((3,), 1 / 3, dtype=torch.float64)), way

    def forward(self, x: Tensor) -> Tensor:
        return (self.way(x * self.weight) * self.weight).to(self.weight.dtype)


def same(x: Tensor) -> Tensor:
    return x


WAYS: list[tuple[Any, Any]] = [  # (as it is written, what it is in float64)
    (lambda x: x.float(), same),
    (lambda x: x.half(), same),
    (lambda x: x.bfloat16(), same),
    (lambda x: x.to(torch.float32), same),
    (lambda x: x.to("cpu", torch.float32), same),
    (lambda x: x.to(dtype=torch.float16), same),
    (lambda x: x.type(torch.float32), same),
    (lambda x: torch.softmax(x, 0, dtype=torch.float32), lambda x: torch.softmax(x, 0)),
    (lambda x: F.softmax(x, 0, 3, torch.float32), lambda x: torch.softmax(x, 0)),
    (lambda x: x @ torch.eye(3), same),
    (lambda x: x @ torch.eye(3, dtype=torch.float32), same),
    (lambda x: x @ torch.tensor([[0.5, 0, 0], [0, 0.5, 0], [0, 0, 0.5]]), lambda x: x / 2),
    (lambda x: torch.arange(3).float() @ torch.diag(x), lambda x: x * torch.arange(3)),
]


@pytest.mark.parametrize(("way", "wanted"), WAYS)
def test_every_cast_is_wide(way: Any, wanted: Any) -> None:
    x = torch.tensor([0.1, 0.7, 1.3], dtype=torch.float64)
    task = Task("x", evaluate=[(x,)], calibrate=[(x,)])
    (found,) = outputs(Spelled(way), task, "double")
    torch.testing.assert_close(found, Spelled(wanted)(x).detach(), rtol=1e-14, atol=0)
