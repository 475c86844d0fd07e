"""Small nets whose operators integer kernels exist for, each with its input, for tests of int8 files.

Batch norms have statistics of their own; weights are large enough that a wrong layer moves every output.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.model.loader import TensorBatches
from tersor.model.task import Task

CLASSES = 5


class Residual(nn.Module):
    """A stem, a residual block, a mean over positions without their axes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = (x + self.b(self.a(x).relu())).relu()
        return self.head(x.mean((2, 3)))


class Inverted(nn.Module):
    """Depthwise convolutions, relu6 in place, squeeze and excitation, a hard swish."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU6(inplace=True))
        self.depth = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Hardswish())
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.point, self.head = nn.Conv2d(8, 12, 1), nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depth(self.stem(x))
        scale = F.hardsigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))
        x = F.relu6(self.point(x * scale))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Branches(nn.Module):
    """Concatenation, max pools, an average pool, a flattened map of known size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.left, self.right = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 3, padding=1)
        self.last, self.fc1, self.fc2 = nn.Conv2d(8, 8, 3), nn.Linear(8 * 3 * 3, 16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        x = torch.cat([F.relu(self.left(x)), self.right(x)], 1)
        x = F.avg_pool2d(self.last(x), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class Mlp(nn.Module):
    """Linear layers on the last axis, a gelu, a product without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(16, 32), nn.Linear(32, 16), nn.LayerNorm(16)
        self.head = nn.Linear(16, CLASSES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x + self.down(F.gelu(self.up(x)))).mean(1))


class Shuffled(nn.Module):
    """One relu for all layers, in-place dropout, channels split and shuffled, a rolled and padded map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.side, self.join = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(4, 4, 1), nn.Conv2d(8, 8, 1)
        self.act, self.drop, self.head = nn.ReLU(), nn.Dropout(0.2, inplace=True), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.act(self.stem(x)).chunk(2, 1)
        x = torch.cat([left, self.act(self.side(right))], 1)
        x = x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)
        x = self.act(self.join(F.pad(x.roll(1, 2), (0, 1, 1, 0)))).flatten(2)
        return self.head(self.drop(x[:, :, 3]))


class Columns(nn.Module):
    """Weights stored as [inputs, outputs], as in GPT-2; an embedding; a linear layer that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.up, self.down = (nn.Parameter(torch.randn(*shape) / 4) for shape in ((16, 32), (32, 16)))
        self.bias, self.pooler = nn.Parameter(torch.randn(32)), nn.Linear(16, 16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.embed.weight[:6]
        hidden = torch.addmm(self.bias, x.reshape(-1, 16), self.up).relu()
        x = (hidden @ self.down).view(x.shape)
        self.pooler(x)
        return self.head(x.mean(1))


class Attended(nn.Module):
    """Causal attention by torch's function, a residual stream, its product with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj, self.norm = nn.Linear(16, 48), nn.Linear(16, 16), nn.LayerNorm(16)
        self.head = nn.Linear(36, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)  # [B, H, T, D]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = self.norm(x + self.proj(out.transpose(1, 2).flatten(2)))
        return self.head((x @ x.transpose(1, 2)).flatten(1)) + x.sum((1, 2))[:, None] / 9


IMAGE, TOKENS = (3, 16, 16), (6, 16)
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (Residual, IMAGE), "inverted": (Inverted, IMAGE), "branches": (Branches, IMAGE),
    "mlp": (Mlp, TOKENS), "shuffled": (Shuffled, IMAGE), "columns": (Columns, TOKENS),
    "attended": (Attended, TOKENS),
}  # fmt: skip


def made(name: str, seed: int = 0) -> tuple[nn.Module, Task]:
    """A net with random weights and statistics, and a task whose labels are the net's own decisions."""
    torch.manual_seed(seed)
    kind, shape = NETS[name]
    net = kind()
    x = torch.randn(64, *shape)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
                module.weight.uniform_(0.5, 2)
        y = net.eval()(x).argmax(1)
    loader = TensorBatches(x, y, batch=16)
    return net, Task(train=loader, evaluate=loader, calibrate=loader, example=(x[:4],))


def note(result: Any, kind: str = "integers") -> Any:
    """The last note of a kind in a result's ledger."""
    *_, found = result.ledger.notes(kind)
    return found
