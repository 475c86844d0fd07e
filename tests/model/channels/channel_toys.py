"""Channel toys: small modules with one difficulty each, and what can be cut of them.

exact   family -> units, where removal has to equal a zero
every   the same, with what normalizers count as well; None: as in exact mode
frozen  (tensor, axis) -> a part of the reason why exact mode cuts nothing there
Widths differ from each other where they may, so that a mix-up has the wrong shape.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.utils._pytree import tree_leaves, tree_map

from tersor.core.apply import apply
from tersor.core.state import start
from tersor.model.changes import Replace
from tersor.model.channels.groups import Family, Groups, groups_of, walked
from tersor.record.events import Group


class Net(nn.Module):
    """Layers by name, and a function that is the forward."""

    def __init__(self, run: Callable[..., Any], **parts: Any):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = run

    def forward(self, *args: Tensor) -> Any:
        return self.run(self, *args)


Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Toy:
    name: str
    make: Callable[[], nn.Module]
    shapes: Shapes  # of the inputs
    exact: dict[str, int]
    every: dict[str, int]
    frozen: dict[tuple[str, int], str]
    stored: bool = True  # as a state has it: weights that layers compute are plain
    words: int = 0  # inputs are word numbers below this
    eager: float = 1e-9  # the module's own forward may be less exact, relative

    def inputs(self) -> Any:
        g = torch.Generator().manual_seed(1)
        if self.words:
            return tuple(torch.randint(self.words, shape, generator=g) for shape in self.shapes)
        return tuple(torch.randn(shape, generator=g) for shape in self.shapes)

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return randomized(prepared(self.make(), self.stored))


TOYS: dict[str, Toy] = {}


def toy(
    *shapes: tuple[int, ...], exact: dict[str, int], every: dict[str, int] | None = None,
    frozen: dict[tuple[str, int], str] | None = None, **rest: Any,
) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:  # fmt: skip
    def add(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        every_ = exact if every is None else every
        TOYS[make.__name__] = Toy(make.__name__, make, shapes, exact, every_, frozen or {}, **rest)
        return make

    return add


def prepared(model: nn.Module, stored: bool = True) -> nn.Module:
    """As slim has it: without parametrizations, nn.MultiheadAttention replaced by the stock one."""
    if not stored:
        return model.eval()
    state = start(model.eval())
    paths = [path for path, part in model.named_modules() if type(part) is nn.MultiheadAttention]
    if paths:
        state = apply(state, Group("attention", tuple(Replace(path, "attention") for path in paths)), "toy")[
            0
        ]
    return state.plain()


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """Norms, biases and layer scales with values that hide no mistake."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.parameters():
            spread = (tensor[0].numel() if tensor.ndim > 1 else 4) ** -0.5
            tensor.copy_(torch.randn(tensor.shape, generator=g) * spread + (0.2 if tensor.ndim == 1 else 0))
        for name, tensor in model.named_buffers():
            if name.endswith("running_mean"):
                tensor.copy_(torch.randn(tensor.shape, generator=g))
            elif name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=g) + 0.5)
    return model


def some_units(groups: Groups, seed: int) -> Any:
    """A mask of 30 to 60 % of the units of each family; 2 stay, and 1 goes at least where there are more."""
    random = np.random.default_rng(seed)

    def chosen(family: Family) -> Any:
        count = min(max(round(random.uniform(0.3, 0.6) * family.size), 1), max(family.size - 2, 0))
        return random.permutation(family.units)[:count]

    return groups.removed([chosen(family) for family in groups.families])


def relu(x: Tensor) -> Tensor:
    return F.relu(x)


# Attention over channels


@toy((2, 3, 6, 6), exact={"a.weight:0": 7}, frozen={("b.weight", 0): "conv1d slides over it"})
def eca() -> nn.Module:
    def run(self: Any, x: Tensor) -> Tensor:
        x = self.b(relu(self.a(x)))
        y = self.over(x.mean((2, 3), keepdim=True).squeeze(-1).transpose(-1, -2))
        x = x * y.transpose(-1, -2).unsqueeze(-1).sigmoid()
        return self.head(x.mean((2, 3)))

    return Net(run, a=nn.Conv2d(3, 7, 3), b=nn.Conv2d(7, 8, 3),
               over=nn.Conv1d(1, 1, 3, padding=1, bias=False), head=nn.Linear(8, 4))  # fmt: skip


@toy(
    (2, 3, 6, 6), exact={"down.weight:0": 4}, every={"a.weight:0": 9, "down.weight:0": 4},
    frozen={("a.weight", 0): "counts it"},
)  # fmt: skip
def cbam() -> nn.Module:
    def run(self: Any, x: Tensor) -> Tensor:
        x = relu(self.a(x))

        def gate(y: Tensor) -> Tensor:
            return self.up(F.silu(self.down(y)))

        x = x * (gate(F.adaptive_avg_pool2d(x, 1)) + gate(F.adaptive_max_pool2d(x, 1))).sigmoid()
        y = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return self.head((x * self.space(y).sigmoid()).flatten(2).sum(2))

    return Net(run, a=nn.Conv2d(3, 9, 3), down=nn.Conv2d(9, 4, 1), up=nn.Conv2d(4, 9, 1),
               space=nn.Conv2d(2, 1, 3, padding=1), head=nn.Linear(9, 5))  # fmt: skip


@toy((2, 3, 6, 6), exact={"up.weight:0": 8, "down.weight:0": 4})
def squeeze_excite() -> nn.Module:
    def run(self: Any, x: Tensor) -> Tensor:
        x = self.norm(self.up(x))
        y = F.adaptive_avg_pool2d(x, 1)
        x = x * F.hardsigmoid(self.back(F.silu(self.down(y))))
        return self.head(x.mean([2, 3]))

    return Net(run, up=nn.Conv2d(3, 8, 3), norm=nn.BatchNorm2d(8), down=nn.Conv2d(8, 4, 1),
               back=nn.Conv2d(4, 8, 1), head=nn.Linear(8, 5))  # fmt: skip


@toy(
    (2, 3, 6, 6), exact={"b.weight:0": 7}, every={"a.weight:0": 6, "b.weight:0": 7},
    frozen={("a.weight", 0): "softmax counts it"},
)  # fmt: skip
def softmax_over_channels() -> nn.Module:
    def run(self: Any, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(self.b(x * x.softmax(1)).mean((2, 3)))

    return Net(run, a=nn.Conv2d(3, 6, 3), b=nn.Conv2d(6, 7, 3), head=nn.Linear(7, 5))


@toy(
    (2, 3, 6, 6), exact={"b.weight:0": 7}, every={"a.weight:0": 6, "b.weight:0": 7},
    frozen={("a.weight", 0): "mean counts it"},
)  # fmt: skip
def mean_over_channels() -> nn.Module:
    def run(self: Any, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(self.b(x - x.mean(1, keepdim=True)).mean((2, 3)))

    return Net(run, a=nn.Conv2d(3, 6, 3), b=nn.Conv2d(6, 7, 3), head=nn.Linear(7, 5))


@toy(
    (2, 3, 6, 6), exact={"b.weight:0": 7}, every={"a.weight:0": 6, "b.weight:0": 7},
    frozen={("a.weight", 0): "max counts it"},
)  # fmt: skip
def largest_over_channels() -> nn.Module:
    """All are below zero, so that the largest of some channels and zeros is zero."""

    def run(self: Any, x: Tensor) -> Tensor:
        x = -1 - self.a(x).abs()
        y = x.max(dim=1, keepdim=True).values * x.min(1).values[:, None]
        return self.head(self.b(x * y + x.std(1, keepdim=True) / x.prod(1, keepdim=True)).mean((2, 3)))

    return Net(run, a=nn.Conv2d(3, 6, 3), b=nn.Conv2d(6, 7, 3), head=nn.Linear(7, 5))


@toy((2, 6), exact={"a.weight:0": 7})
def larger_of_two() -> nn.Module:
    def run(self: Any, x: Tensor) -> Tensor:
        return self.head(torch.max(self.a(x), torch.minimum(self.b(x), self.c(x))))

    return Net(run, a=nn.Linear(6, 7), b=nn.Linear(6, 7), c=nn.Linear(6, 7), head=nn.Linear(7, 3))


@toy((2, 3, 6, 6), exact={"a.weight:0": 6})
def sum_over_channels() -> nn.Module:
    def run(self: Any, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head((x * x.pow(2).sum(dim=1, keepdim=True).tanh()).amax((-1, -2)))

    return Net(run, a=nn.Conv2d(3, 6, 3), head=nn.Linear(6, 5))


# Convolutions, shortcuts, shared modules


@toy(
    (2, 3, 8, 8), exact={"b.weight:0": 7, "d.weight:0": 9},
    frozen={("a.weight", 0): "padded", ("c.weight", 0): "padded"},
)  # fmt: skip
def padded_shortcut() -> nn.Module:
    """Option A of ResNets for CIFAR."""

    def run(self: Any, x: Tensor) -> Tensor:
        x = relu(self.a(x))
        y = self.norm(self.c(relu(self.b(x))))
        x = relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))
        return self.head(self.d(x).mean((2, 3)))

    return Net(run, a=nn.Conv2d(3, 4, 3, padding=1), b=nn.Conv2d(4, 7, 3, stride=2, padding=1),
               c=nn.Conv2d(7, 8, 3, padding=1), norm=nn.BatchNorm2d(8), d=nn.Conv2d(8, 9, 3),
               head=nn.Linear(9, 5))  # fmt: skip


@toy((2, 3, 6, 6), exact={"stem.weight:0": 8})
def shared_twice() -> nn.Module:
    def run(self: Any, x: Tensor) -> Tensor:
        x = relu(self.stem(x))
        for _ in range(2):
            x = relu(self.norm(self.same(x)))
        return self.head(x.mean((2, 3)))

    return Net(run, stem=nn.Conv2d(3, 8, 3), same=nn.Conv2d(8, 8, 3, padding=1), norm=nn.BatchNorm2d(8),
               head=nn.Linear(8, 5))  # fmt: skip


@toy((2, 3, 6, 6), exact={"stem.weight:0": 8, "wide.weight:0": 6})
def depthwise() -> nn.Module:
    """The second depthwise layer makes two channels of each that it reads."""

    def run(self: Any, x: Tensor) -> Tensor:
        x = relu(self.norm(self.one(self.stem(x))))
        return self.head(relu(self.two(self.wide(x))).mean((2, 3)))

    return Net(run, stem=nn.Conv2d(3, 8, 1), one=nn.Conv2d(8, 8, 3, groups=8, padding=1),
               norm=nn.BatchNorm2d(8), wide=nn.Conv2d(8, 6, 1), two=nn.Conv2d(6, 12, 3, groups=6),
               head=nn.Linear(12, 5))  # fmt: skip


@toy((2, 3, 9, 9), exact={"stem.weight:0": 4, "last.weight:0": 5})
def dilated_groups() -> nn.Module:
    def run(self: Any, x: Tensor) -> Tensor:
        x = relu(self.grouped(relu(self.stem(x))))
        return self.head(self.last(x).mean((2, 3)))

    return Net(run, stem=nn.Conv2d(3, 12, 1), grouped=nn.Conv2d(12, 20, 3, dilation=2, padding=2, groups=4),
               last=nn.Conv2d(20, 5, 1), head=nn.Linear(5, 3))  # fmt: skip


@toy((2, 3, 5, 5), exact={"stem.weight:0": 4, "plain.weight:1": 6})
def transposed() -> nn.Module:
    def run(self: Any, x: Tensor) -> Tensor:
        x = relu(self.grouped(relu(self.stem(x))))
        return self.head(relu(self.norm(self.plain(x))).mean((2, 3)))

    return Net(run, stem=nn.Conv2d(3, 8, 1), grouped=nn.ConvTranspose2d(8, 20, 3, stride=2, groups=4),
               plain=nn.ConvTranspose2d(20, 6, 2, stride=2), norm=nn.BatchNorm2d(6),
               head=nn.Linear(6, 3))  # fmt: skip


@toy((2, 3, 6, 6), exact={"stem.weight:0": 6, "one.weight:0": 3, "two.weight:0": 4})
def channel_shuffle() -> nn.Module:
    """Places within groups go: of the 12 shuffled channels, 3 sets of 4 that belong together."""

    def run(self: Any, x: Tensor) -> Tensor:
        x = relu(self.one(relu(self.stem(x))))
        b, c, h, w = x.shape
        x = x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        return self.head(self.two(self.deep(x)).mean((2, 3)))

    return Net(run, stem=nn.Conv2d(3, 12, 1), one=nn.Conv2d(12, 12, 1, groups=2),
               deep=nn.Conv2d(12, 12, 3, groups=12), two=nn.Conv2d(12, 8, 1, groups=2),
               head=nn.Linear(8, 4))  # fmt: skip


@toy((2, 3, 6, 6), exact={"stem.weight:0": 6, "one.weight:0": 3, "two.weight:0": 4})
def channel_shuffle_layer() -> nn.Module:
    """The same by the layer, whose number of groups is an attribute."""

    def run(self: Any, x: Tensor) -> Tensor:
        x = self.shuffle(relu(self.one(relu(self.stem(x)))))
        return self.head(self.two(self.deep(x)).mean((2, 3)))

    return Net(run, stem=nn.Conv2d(3, 12, 1), one=nn.Conv2d(12, 12, 1, groups=2),
               shuffle=nn.ChannelShuffle(2), deep=nn.Conv2d(12, 12, 3, groups=12),
               two=nn.Conv2d(12, 8, 1, groups=2), head=nn.Linear(8, 4))  # fmt: skip


@toy((2, 3, 6, 6), exact={"a.weight:0": 6, "b.weight:0": 9})
def channel_shuffle_plain() -> nn.Module:
    """Without groups beside it: of 12 channels, the 6 groups of the shuffle go."""

    def run(self: Any, x: Tensor) -> Tensor:
        return self.head(relu(self.b(F.channel_shuffle(relu(self.a(x)), self.parts))).mean((2, 3)))

    return Net(run, a=nn.Conv2d(3, 12, 1), parts=6, b=nn.Conv2d(12, 9, 1), head=nn.Linear(9, 5))


@toy((2, 3, 6, 6), exact={"stem.weight:0": 6, "a.weight:0": 4, "b.weight:0": 4, "mix.weight:0": 7})
def dense_cat() -> nn.Module:
    def run(self: Any, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.a(relu(self.norm1(x)))], 1)
        x = torch.cat([x, self.b(relu(self.norm2(x)))], 1)
        return self.head(self.mix(x).mean((2, 3)))

    return Net(run, stem=nn.Conv2d(3, 6, 3), norm1=nn.BatchNorm2d(6), a=nn.Conv2d(6, 4, 3, padding=1),
               norm2=nn.BatchNorm2d(10), b=nn.Conv2d(10, 4, 3, padding=1), mix=nn.Conv2d(14, 7, 1),
               head=nn.Linear(7, 5))  # fmt: skip


@toy((2, 3, 12), exact={"a.weight:0": 6, "b.weight:0": 7})
def conv1d() -> nn.Module:
    def run(self: Any, x: Tensor) -> Tensor:
        x = F.max_pool1d(F.gelu(self.norm(self.a(x))), 2)
        return self.head(F.elu(self.b(x)).mean(-1))

    return Net(run, a=nn.Conv1d(3, 6, 3), norm=nn.BatchNorm1d(6), b=nn.Conv1d(6, 7, 3, padding=1),
               head=nn.Linear(7, 5))  # fmt: skip


@toy((2, 2, 4, 6, 6), exact={"a.weight:0": 6, "b.weight:0": 5})
def conv3d() -> nn.Module:
    def run(self: Any, x: Tensor) -> Tensor:
        x = F.avg_pool3d(relu(self.norm(self.a(x))), (1, 2, 2))
        return self.head(F.adaptive_avg_pool3d(self.b(x), 1).flatten(1))

    return Net(run, a=nn.Conv3d(2, 6, 3, padding=1), norm=nn.BatchNorm3d(6), b=nn.Conv3d(6, 5, 3, padding=1),
               head=nn.Linear(5, 4))  # fmt: skip


@toy((2, 3, 6, 6), exact={"a.weight:0": 6, "fc.weight:0": 9})
def flattened() -> nn.Module:
    def run(self: Any, x: Tensor) -> Tensor:
        return self.head(relu(self.fc(torch.flatten(F.max_pool2d(relu(self.a(x)), 2), 1))))

    return Net(run, a=nn.Conv2d(3, 6, 3), fc=nn.Linear(24, 9), head=nn.Linear(9, 5))


@toy((2, 3, 6, 6), exact={"scale:0": 6, "b.weight:0": 9})
def layer_scale() -> nn.Module:
    def run(self: Any, x: Tensor) -> Tensor:
        x = self.a(x)
        x = x + self.scale[:, None, None] * self.c(F.gelu(self.b(x)))
        return self.head(x.mean((2, 3)))

    return Net(run, a=nn.Conv2d(3, 6, 3), b=nn.Conv2d(6, 9, 1), c=nn.Conv2d(9, 6, 1),
               scale=nn.Parameter(torch.ones(6)), head=nn.Linear(6, 5))  # fmt: skip


@toy((2, 3, 6, 6), exact={"a.weight:0": 4, "b.weight:0": 6})
def pixel_shuffle() -> nn.Module:
    """Four channels of `a` become one, at four places."""

    def run(self: Any, x: Tensor) -> Tensor:
        return self.head(relu(self.b(relu(self.shuffle(self.a(x))))).mean((2, 3)))

    return Net(
        run, a=nn.Conv2d(3, 16, 3), shuffle=nn.PixelShuffle(2), b=nn.Conv2d(4, 6, 3), head=nn.Linear(6, 5)
    )


@toy((2, 3, 6, 6), exact={"b.weight:0": 6}, frozen={("a.weight", 0): "pixel_shuffle"})
def pixel_shuffle_to_one() -> nn.Module:
    """The four channels are places of one."""

    def run(self: Any, x: Tensor) -> Tensor:
        return self.head(relu(self.b(F.pixel_shuffle(self.a(x), 2))).mean((2, 3)))

    return Net(run, a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(1, 6, 3), head=nn.Linear(6, 5))


@toy((2, 3, 6, 6), exact={"a.weight:0": 5, "b.weight:0": 6})
def pixel_unshuffle() -> nn.Module:
    def run(self: Any, x: Tensor) -> Tensor:
        return self.head(relu(self.b(F.pixel_unshuffle(relu(self.a(x)), 2))).mean((2, 3)))

    return Net(run, a=nn.Conv2d(3, 5, 3), b=nn.Conv2d(20, 6, 1), head=nn.Linear(6, 5))


@toy((2, 3, 5, 5), exact={"a.weight:0": 5, "b.weight:0": 6})
def resized() -> nn.Module:
    def run(self: Any, x: Tensor) -> Tensor:
        x = relu(self.a(x))
        x = F.interpolate(x, scale_factor=2, mode="nearest") + F.interpolate(x, size=(6, 6), mode="bilinear")
        return self.head(self.b(x).mean((2, 3)))

    return Net(run, a=nn.Conv2d(3, 5, 3), b=nn.Conv2d(5, 6, 3), head=nn.Linear(6, 5))


@toy((2, 3, 5, 5), exact={"a.weight:0": 5, "b.weight:0": 6})
def repeat_interleave() -> nn.Module:
    def run(self: Any, x: Tensor) -> Tensor:
        return self.head(relu(self.b(relu(self.a(x)).repeat_interleave(3, dim=1))).mean((2, 3)))

    return Net(run, a=nn.Conv2d(3, 5, 3), b=nn.Conv2d(15, 6, 1), head=nn.Linear(6, 5))


@toy((2, 3, 5, 5), exact={"a.weight:0": 5, "b.weight:0": 6})
def tiled() -> nn.Module:
    def run(self: Any, x: Tensor) -> Tensor:
        return self.head(relu(self.b(relu(self.a(x)).repeat(1, 2, 1, 1))).mean((2, 3)))

    return Net(run, a=nn.Conv2d(3, 5, 3), b=nn.Conv2d(10, 6, 1), head=nn.Linear(6, 5))


# Slices and pieces


@toy((2, 3, 5, 5), exact={"a.weight:0": 5, "b.weight:0": 6})
def glu() -> nn.Module:
    def run(self: Any, x: Tensor) -> Tensor:
        x = F.glu(self.a(x), 1)
        return self.head(self.b(x).mean((2, 3)))

    return Net(run, a=nn.Conv2d(3, 10, 3), b=nn.Conv2d(5, 6, 3), head=nn.Linear(6, 5))


@toy((2, 7, 6), exact={"a.weight:0": 5})
def gated_by_chunk() -> nn.Module:
    def run(self: Any, x: Tensor) -> Tensor:
        value, gate = self.a(x).chunk(2, -1)
        return self.b(value * F.silu(gate))

    return Net(run, a=nn.Linear(6, 10), b=nn.Linear(5, 4))


@toy((2, 6), exact={"c.weight:0": 9}, frozen={("a.weight", 0): "parts of different sizes"})
def uneven_chunk() -> nn.Module:
    def run(self: Any, x: Tensor) -> Tensor:
        one, two, three = relu(self.a(x)).chunk(3, 1)
        return self.head(relu(self.c(torch.cat([three, one * two], 1))))

    return Net(run, a=nn.Linear(6, 8), c=nn.Linear(5, 9), head=nn.Linear(9, 3))


@toy((2, 6), exact={"a.weight:0": 4})
def halves() -> nn.Module:
    """Read by different layers; but the code asks for parts of one size."""

    def run(self: Any, x: Tensor) -> Tensor:
        one, two = relu(self.a(x)).chunk(2, 1)
        return self.b(one) * self.c(two)

    return Net(run, a=nn.Linear(6, 8), b=nn.Linear(4, 3), c=nn.Linear(4, 3))


@toy((2, 6), exact={"a.weight:0": 3, "a.weight:0/2": 5})
def split_by_sizes() -> nn.Module:
    """Two parts that need not stay alike."""

    def run(self: Any, x: Tensor) -> Tensor:
        one, two = relu(self.a(x)).split([3, 5], 1)
        return self.b(one) * self.c(two)

    return Net(run, a=nn.Linear(6, 8), b=nn.Linear(3, 4), c=nn.Linear(5, 4))


@toy((2, 3, 6, 6), exact={"a.weight:0": 4, "b.weight:0": 6})
def slice_assignment() -> nn.Module:
    def run(self: Any, x: Tensor) -> Tensor:
        y = x.new_zeros(len(x), 10, 4, 4)
        y[:, :4] = self.a(x)
        y[:, 4:] = relu(self.b(x))
        return self.head(y.mean((2, 3)))

    return Net(run, a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(3, 6, 3), head=nn.Linear(10, 5))


@toy((2, 4, 3, 5, 5), exact={"a.weight:0": 9, "b.weight:0": 6})
def temporal_shift() -> nn.Module:
    """A part of the channels comes from the next frame, another from the one before."""

    def run(self: Any, x: Tensor) -> Tensor:
        batch, frames = x.shape[:2]
        x = relu(self.a(x.flatten(0, 1)))
        x = x.view(batch, frames, *x.shape[1:])
        y = torch.zeros_like(x)
        y[:, :-1, :2] = x[:, 1:, :2]
        y[:, 1:, 2:4] = x[:, :-1, 2:4]
        y[:, :, 4:] = x[:, :, 4:]
        return self.head(self.b(y.flatten(0, 1)).mean((2, 3)))

    return Net(run, a=nn.Conv2d(3, 9, 3), b=nn.Conv2d(9, 6, 3), head=nn.Linear(6, 5))


@toy((2, 6), exact={"c.weight:0": 7}, frozen={("a.weight", 0): "named one by one"})
def unbound() -> nn.Module:
    def run(self: Any, x: Tensor) -> Tensor:
        one, two, three, four = relu(self.a(x)).unbind(1)
        return self.head(relu(self.c(torch.stack([one * two, three + four], 1))))

    return Net(run, a=nn.Linear(6, 4), c=nn.Linear(2, 7), head=nn.Linear(7, 3))


@toy((2, 3, 5, 5), exact={"b.weight:0": 6}, frozen={("a.weight", 0): "size 1"})
def squeezed() -> nn.Module:
    """A dimension of one channel; those of two stay two when squeeze looks at them."""

    def run(self: Any, x: Tensor) -> Tensor:
        x = self.b(self.a(x).squeeze().unsqueeze(1))
        return self.head(x.mean((2, 3), keepdim=True).squeeze())

    return Net(run, a=nn.Conv2d(3, 1, 3), b=nn.Conv2d(1, 6, 3), head=nn.Linear(6, 5))


@toy((2, 3, 5, 5), exact={"b.weight:0": 7}, frozen={("a.weight", 0): "the other side of a reshape"})
def gram_product() -> nn.Module:
    """A channel is on both sides of the product."""

    def run(self: Any, x: Tensor) -> Tensor:
        y = relu(self.a(x)).flatten(2)
        return self.head(relu(self.b(torch.bmm(y, y.transpose(1, 2)).flatten(1))))

    return Net(run, a=nn.Conv2d(3, 5, 3), b=nn.Linear(25, 7), head=nn.Linear(7, 4))


@toy((2, 3, 5, 5), exact={"b.weight:0": 7}, frozen={("a.weight", 0): "cumsum"})
def running_sum() -> nn.Module:
    def run(self: Any, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x).cumsum(1)).mean((2, 3)))

    return Net(run, a=nn.Conv2d(3, 5, 3), b=nn.Conv2d(5, 7, 3), head=nn.Linear(7, 4))


@toy((2, 3, 5, 5), exact={"b.weight:0": 7}, frozen={("a.weight", 0): "roll"})
def rolled() -> nn.Module:
    def run(self: Any, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x).roll(1, 1)).mean((2, 3)))

    return Net(run, a=nn.Conv2d(3, 5, 3), b=nn.Conv2d(5, 7, 3), head=nn.Linear(7, 4))


@toy(
    (2, 6),
    exact={"c.weight:0": 9},
    frozen={("a.weight", 0): "no rule for topk", ("b.weight", 0): "no rule for topk"},
)
def no_rule() -> nn.Module:
    def run(self: Any, x: Tensor) -> Tensor:
        return self.head(relu(self.c((relu(self.a(x)) * self.b(x)).topk(4, 1).values)))

    return Net(run, a=nn.Linear(6, 8), b=nn.Linear(6, 8), c=nn.Linear(4, 9), head=nn.Linear(9, 3))


# Norms


@toy(
    (2, 5, 6), exact={"up.weight:0": 11}, every={"scale:0": 8, "up.weight:0": 11},
    frozen={("into.weight", 0): "counts it"},
)  # fmt: skip
def root_mean_square() -> nn.Module:
    """One norm of torch's, one written out."""

    def run(self: Any, x: Tensor) -> Tensor:
        x = self.into(x)
        x = x + self.down(F.silu(self.up(self.norm(x))))
        return self.head(self.scale * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)))

    return Net(run, into=nn.Linear(6, 8), norm=nn.RMSNorm(8), up=nn.Linear(8, 11), down=nn.Linear(11, 8),
               scale=nn.Parameter(torch.ones(8)), head=nn.Linear(8, 3))  # fmt: skip


@toy(
    (2, 3, 6, 6), exact={"b.weight:0": 13}, every={"a.weight:0": 7, "b.weight:0": 13},
    frozen={("norm.weight", 0): "layer_norm counts it"},
)  # fmt: skip
def convnext() -> nn.Module:
    def run(self: Any, x: Tensor) -> Tensor:
        x = self.a(x)
        y = self.norm(self.deep(x).permute(0, 2, 3, 1))
        x = x + self.c(F.gelu(self.b(y))).permute(0, 3, 1, 2)
        return self.head(x.mean((-2, -1)))

    return Net(run, a=nn.Conv2d(3, 7, 3), deep=nn.Conv2d(7, 7, 3, padding=1, groups=7), norm=nn.LayerNorm(7),
               b=nn.Linear(7, 13), c=nn.Linear(13, 7), head=nn.Linear(7, 5))  # fmt: skip


@toy((2, 3, 6, 6), exact={"a.weight:0": 4, "b.weight:0": 6})
def group_norm() -> nn.Module:
    """Whole groups go, of three channels each."""

    def run(self: Any, x: Tensor) -> Tensor:
        return self.head(self.b(relu(self.norm(self.a(x)))).mean((2, 3)))

    return Net(
        run, a=nn.Conv2d(3, 12, 3), norm=nn.GroupNorm(4, 12), b=nn.Conv2d(12, 6, 3), head=nn.Linear(6, 5)
    )


@toy(
    (2, 3, 6, 6), exact={"a.weight:0": 1, "b.weight:0": 6}, every={"a.weight:0": 3, "b.weight:0": 6}
)  # fmt: skip
def places_in_groups() -> nn.Module:
    """Groups change places, so that none goes without the others; the places in them are counted."""

    def run(self: Any, x: Tensor) -> Tensor:
        x = self.norm(self.a(x)).unflatten(1, (4, 3)).flip(1).flatten(1, 2)
        return self.head(self.b(relu(x)).mean((2, 3)))

    return Net(
        run, a=nn.Conv2d(3, 12, 3), norm=nn.GroupNorm(4, 12), b=nn.Conv2d(12, 6, 3), head=nn.Linear(6, 5)
    )


@toy(
    (2, 3, 6, 6), exact={"b.weight:0": 6}, every={"a.weight:0": 7, "b.weight:0": 6},
    frozen={("a.weight", 0): "group_norm counts it"},
)  # fmt: skip
def one_group() -> nn.Module:
    def run(self: Any, x: Tensor) -> Tensor:
        return self.head(self.b(relu(self.norm(self.a(x)))).mean((2, 3)))

    return Net(run, a=nn.Conv2d(3, 7, 3), norm=nn.GroupNorm(1, 7), b=nn.Conv2d(7, 6, 3), head=nn.Linear(6, 5))


@toy((2, 3, 6, 6), exact={"a.weight:0": 7, "b.weight:0": 6})
def instance_norm() -> nn.Module:
    def run(self: Any, x: Tensor) -> Tensor:
        x = relu(self.norm(self.a(x)))
        return self.head(relu(self.tracked(self.b(x))).mean((2, 3)))

    return Net(run, a=nn.Conv2d(3, 7, 3), norm=nn.InstanceNorm2d(7, affine=True), b=nn.Conv2d(7, 6, 3),
               tracked=nn.InstanceNorm2d(6, track_running_stats=True), head=nn.Linear(6, 5))  # fmt: skip


@toy((2, 3, 6, 6), exact={"a.weight:0": 7, "b.weight:0": 6})
def plain_batch_norm() -> nn.Module:
    """Without weight and bias: only statistics."""

    def run(self: Any, x: Tensor) -> Tensor:
        return self.head(self.b(relu(self.norm(self.a(x)))).mean((2, 3)))

    return Net(run, a=nn.Conv2d(3, 7, 3, bias=False), norm=nn.BatchNorm2d(7, affine=False),
               b=nn.Conv2d(7, 6, 3),
               head=nn.Linear(6, 5))  # fmt: skip


@toy((2, 3, 6, 6), exact={"a.weight:0": 7, "b.weight:0": 6})
def many_slopes() -> nn.Module:
    def run(self: Any, x: Tensor) -> Tensor:
        return self.head(self.one(self.b(self.each(self.a(x)))).mean((2, 3)))

    return Net(
        run,
        a=nn.Conv2d(3, 7, 3),
        each=nn.PReLU(7),
        b=nn.Conv2d(7, 6, 3),
        one=nn.PReLU(),
        head=nn.Linear(6, 5),
    )


@toy((2, 6), exact={"a.weight:0": 7, "b.weight:0": 8}, eager=1e-5)
def float_region() -> nn.Module:
    """A norm in float32, whatever the rest is."""

    def run(self: Any, x: Tensor) -> Tensor:
        x = relu(self.a(x))
        y = x.to(torch.float32)
        y = (y * torch.rsqrt(y.pow(2).sum(-1, keepdim=True) + 1)).to(x.dtype)
        return self.head(self.b(y).float().tanh().type_as(x))

    return Net(run, a=nn.Linear(6, 7), b=nn.Linear(7, 8), head=nn.Linear(8, 3))


@toy((2, 6), exact={"a.weight:0": 7, "b.weight:0": 8})
def autocast_region() -> nn.Module:
    """One region in another precision, one that must not be."""

    def run(self: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = relu(self.a(x))
        with torch.autocast("cpu", enabled=False):
            x = self.b(x.to(self.b.weight.dtype)).tanh()
        return self.head(x)

    return Net(run, a=nn.Linear(6, 7), b=nn.Linear(7, 8), head=nn.Linear(8, 3))


# Computed weights


def two_convolutions() -> nn.Module:
    def run(self: Any, x: Tensor) -> Tensor:
        return self.head(relu(self.b(relu(self.a(x)))).mean((2, 3)))

    return Net(run, a=nn.Conv2d(3, 7, 3), b=nn.Conv2d(7, 6, 3), head=nn.Linear(6, 5))


@toy((2, 3, 6, 6), exact={"a.bias:0": 7, "b.bias:0": 6})
def weight_norm() -> nn.Module:
    net = two_convolutions()
    parametrizations.weight_norm(net.a)
    parametrizations.weight_norm(net.b)
    return net


@toy((2, 3, 6, 6), exact={"a.bias:0": 7, "b.bias:0": 6})
def spectral_norm() -> nn.Module:
    net = two_convolutions()
    parametrizations.spectral_norm(net.a)
    parametrizations.spectral_norm(net.b)
    return net


class Doubled(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


@toy((2, 3, 6, 6), stored=False, exact={"a.bias:0": 7, "b.weight:0": 6})
def computed_weight() -> nn.Module:
    net = two_convolutions()
    parametrize.register_parametrization(net.a, "weight", Doubled())
    return net


@toy(
    (2, 3, 6, 6), exact={"b.weight:0": 6}, every={"a.weight:0": 7, "b.weight:0": 6},
    frozen={("a.weight", 0): "counts it"},
)  # fmt: skip
def standardized_weight() -> nn.Module:
    """The weight of b is normalized over its inputs, by a batch norm without statistics."""

    def run(self: Any, x: Tensor) -> Tensor:
        x = relu(self.a(x))
        w = self.b.weight
        w = F.batch_norm(w.reshape(1, len(w), -1), None, None, training=True).reshape_as(w)
        return self.head(relu(F.conv2d(x, w, self.b.bias)).mean((2, 3)))

    return Net(run, a=nn.Conv2d(3, 7, 3), b=nn.Conv2d(7, 6, 3), head=nn.Linear(6, 5))


# Tokens


def heads_of(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


@toy((2, 5, 6), exact={"q.weight:0": 4})
def einsum_attention() -> nn.Module:
    def run(self: Any, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (layer(x).view(b, t, 4, 3) for layer in (self.q, self.k, self.v))
        weights = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
        return self.out(torch.einsum("bhqk, bkhd -> bqhd", weights, v).reshape(b, t, 12))

    return Net(run, q=nn.Linear(6, 12), k=nn.Linear(6, 12), v=nn.Linear(6, 12), out=nn.Linear(12, 4))


@toy((2, 5, 6), exact={"qkv.weight:0": 4})
def talking_heads() -> nn.Module:
    def run(self: Any, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, 4, 3).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1)).softmax(-1)
        weights = self.mix(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.out((weights @ v).transpose(1, 2).flatten(2))

    return Net(run, qkv=nn.Linear(6, 36), mix=nn.Linear(4, 4), out=nn.Linear(12, 4))


@toy((2, 5, 6), exact={"qk.weight:0": 4, "v.weight:0": 5})
def talking_to_more_heads() -> nn.Module:
    """Scores of 4 heads are mixed into 5: two families."""

    def run(self: Any, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k = self.qk(x).reshape(b, t, 2, 4, 3).permute(2, 0, 3, 1, 4).unbind(0)
        v = self.v(x).reshape(b, t, 5, 2).transpose(1, 2)
        weights = self.mix((q @ k.mT).movedim(1, -1)).softmax(2).movedim(-1, 1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))

    return Net(run, qk=nn.Linear(6, 24), v=nn.Linear(6, 10), mix=nn.Linear(4, 5), out=nn.Linear(10, 4))


@toy((2, 5, 6), exact={"q.weight:0": 3})
def grouped_queries() -> nn.Module:
    """Two queries for each of three keys and values."""

    def run(self: Any, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, 6, 4).transpose(1, 2)
        k, v = (layer(x).view(b, t, 3, 4).transpose(1, 2) for layer in (self.k, self.v))
        k, v = (y[:, :, None].expand(b, 3, 2, t, 4).reshape(b, 6, t, 4) for y in (k, v))
        return self.out(
            F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, -1)
        )

    return Net(run, q=nn.Linear(6, 24), k=nn.Linear(6, 12), v=nn.Linear(6, 12), out=nn.Linear(24, 5))


@toy((2, 5, 6), exact={"q.weight:0": 3})
def grouped_queries_in_one_call() -> nn.Module:
    def run(self: Any, x: Tensor) -> Tensor:
        q, k, v = heads_of(self.q(x), 6), heads_of(self.k(x), 3), heads_of(self.v(x), 3)
        return self.out(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))

    return Net(run, q=nn.Linear(6, 24), k=nn.Linear(6, 12), v=nn.Linear(6, 12), out=nn.Linear(24, 5))


@toy((2, 5, 6), exact={"into.weight:0": 8, "attention.in_proj_weight:0": 4})
def stock_attention() -> nn.Module:
    def run(self: Any, x: Tensor) -> Tensor:
        x = self.into(x)
        return self.head(self.attention(x, x, x, need_weights=False)[0] + x)

    return Net(
        run,
        into=nn.Linear(6, 8),
        attention=nn.MultiheadAttention(8, 4, batch_first=True),
        head=nn.Linear(8, 3),
    )


@toy(
    (2, 5, 6), exact={"layer.self_attn.in_proj_weight:0": 4, "layer.linear1.weight:0": 11},
    every={"into.weight:0": 8, "layer.self_attn.in_proj_weight:0": 4, "layer.linear1.weight:0": 11},
    frozen={("into.weight", 0): "layer_norm counts it"},
)  # fmt: skip
def encoder_layer() -> nn.Module:
    def run(self: Any, x: Tensor) -> Tensor:
        return self.head(self.layer(self.into(x)))

    layer = nn.TransformerEncoderLayer(8, 4, 11, batch_first=True, activation="gelu", norm_first=True)
    return Net(run, into=nn.Linear(6, 8), layer=layer, head=nn.Linear(8, 3))


@toy((2, 5, 6), exact={"q.weight:0": 5, "v.weight:0": 4}, frozen={("out.weight", 0): "output"})
def width_of_heads() -> nn.Module:
    """Heads stay, since one is taken by its place; the scale of attention is that of the first width."""

    def run(self: Any, x: Tensor) -> Tensor:
        q, k, v = (heads_of(layer(x), 3) for layer in (self.q, self.k, self.v))
        x = F.scaled_dot_product_attention(q.flip(1), k, v)
        return self.out(x.transpose(1, 2).flatten(2))

    return Net(run, q=nn.Linear(6, 15), k=nn.Linear(6, 15), v=nn.Linear(6, 12), out=nn.Linear(12, 4))


@toy((2, 5, 6), exact={"qkv.weight:0": 3}, eager=1e-6)
def rotary() -> nn.Module:
    """Positions tie the halves of a head's width, and no head to another."""

    def run(self: Any, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        angle = torch.arange(t, device=x.device)[:, None] * torch.tensor([1.0, 0.1])
        angle = torch.cat([angle, angle], -1).to(x.dtype)

        def turned(y: Tensor) -> Tensor:
            one, two = y.chunk(2, -1)
            return y * angle.cos() + torch.cat([-two, one], -1) * angle.sin()

        q, k, v = (heads_of(y, 3) for y in self.qkv(x).split(12, -1))
        return self.out(F.scaled_dot_product_attention(turned(q), turned(k), v).transpose(1, 2).flatten(2))

    return Net(run, qkv=nn.Linear(6, 36), out=nn.Linear(12, 5))


@toy((2, 6, 6, 4), exact={"table:1": 3})
def window_attention() -> nn.Module:
    """Windows of a map, a bias for each head, and windows put together again."""

    def run(self: Any, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        y = x.view(b, h // 3, 3, w // 3, 3, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 9, c)
        q, k, v = self.qkv(y).reshape(len(y), 9, 3, 3, 2).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.at].view(9, 9, 3).permute(2, 0, 1)
        y = ((q * 2**-0.5) @ k.transpose(-2, -1) + bias).softmax(-1) @ v
        y = self.out(y.transpose(1, 2).reshape(len(y), 9, 6))
        y = y.view(b, h // 3, w // 3, 3, 3, 4).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, 4)
        return self.head(x + y)

    net = Net(
        run,
        qkv=nn.Linear(4, 18),
        out=nn.Linear(6, 4),
        head=nn.Linear(4, 3),
        table=nn.Parameter(torch.ones(7, 3)),
    )
    net.register_buffer("at", torch.arange(81) % 7)
    return net


@toy(
    (2, 6), words=11, exact={"up.weight:0": 9}, every={"places:1": 8, "up.weight:0": 9},
    frozen={("places", 0): "sliced off", ("words.weight", 0): "looked up", ("words.weight", 1): "counts it"},
)  # fmt: skip
def tied_embedding() -> nn.Module:
    def run(self: Any, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.places[: tokens.shape[1]]
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return self.head(x)

    net = Net(run, words=nn.Embedding(11, 8), places=nn.Parameter(torch.ones(10, 8)), norm=nn.LayerNorm(8),
              up=nn.Linear(8, 9), down=nn.Linear(9, 8), head=nn.Linear(8, 11, bias=False))  # fmt: skip
    net.head.weight = net.words.weight
    return net


@toy((2, 4, 6), exact={"into.weight:0": 7, "one.weight:0": 9, "mid.weight:0": 8, "last.weight:0": 5})
def token_mixing() -> nn.Module:
    """Layers over tokens: inside, tokens are units as channels are, and a product has three living sizes."""

    def run(self: Any, x: Tensor) -> Tensor:
        x = self.into(x).transpose(1, 2)
        x = x + self.two(F.gelu(self.mid(F.gelu(self.one(x)))))
        return self.head(self.last(x.transpose(1, 2)))

    return Net(run, into=nn.Linear(6, 7), one=nn.Linear(4, 9), mid=nn.Linear(9, 8), two=nn.Linear(8, 4),
               last=nn.Linear(7, 5), head=nn.Linear(5, 3))  # fmt: skip


# Recurrent layers


@toy((2, 5, 6), exact={"cell.weight_ih_l0:0": 5, "last.weight:0": 7})
def lstm() -> nn.Module:
    """Two directions, two layers: one hidden size for all."""

    def run(self: Any, x: Tensor) -> Tensor:
        x, (h, _) = self.cell(x)
        return self.head(relu(self.last(x))).sum(1) + h.sum((0, 2))[:, None]

    return Net(run, cell=nn.LSTM(6, 5, num_layers=2, bidirectional=True, batch_first=True),
               last=nn.Linear(10, 7),
               head=nn.Linear(7, 3))  # fmt: skip


@toy((5, 2, 6), exact={"cell.weight_ih_l0:0": 8})
def gru() -> nn.Module:
    def run(self: Any, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0])

    return Net(run, cell=nn.GRU(6, 8, num_layers=2), head=nn.Linear(8, 3))


@toy((2, 5, 6), exact={"last.weight:0": 7}, frozen={("cell.weight_hh_l0", 0): "no rule for lstm"})
def projected_lstm() -> nn.Module:
    def run(self: Any, x: Tensor) -> Tensor:
        return self.head(relu(self.last(self.cell(x)[0])))

    return Net(
        run, cell=nn.LSTM(6, 8, proj_size=4, batch_first=True), last=nn.Linear(4, 7), head=nn.Linear(7, 3)
    )


# Arguments by name


class Named(nn.Module):
    """Several arguments, not given in the order of the signature, one of them in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = (
            nn.Linear(6, 7),
            nn.Linear(5, 7),
            nn.Linear(4, 8),
            nn.Linear(15, 3),
        )

    def forward(
        self, left: Tensor, right: Tensor, more: dict[str, Tensor], scale: float = 1.0
    ) -> dict[str, Tensor]:
        x = relu(self.a(left)) * self.b(right)
        return {"out": self.head(torch.cat([x * scale, relu(self.c(more["z"]) + self.c(more["y"]))], -1))}


@dataclass(frozen=True)
class NamedToy(Toy):
    def inputs(self) -> Any:
        g = torch.Generator().manual_seed(1)
        y, z, right, left = (torch.randn(2, n, generator=g) for n in (4, 4, 5, 6))
        return {"more": {"y": y, "z": z}, "right": right, "left": left}


TOYS["named"] = NamedToy(
    "named", Named, (), {"a.weight:0": 7, "c.weight:0": 8}, {"a.weight:0": 7, "c.weight:0": 8}, {}
)


COUNTED = [name for name in TOYS if TOYS[name].exact != TOYS[name].every]


@cache
def known(name: str) -> tuple[nn.Module, Any, Groups, Groups]:
    """(the module, its inputs, its groups in exact mode, in all mode)."""
    toy = TOYS[name]
    model, inputs = toy.model(), toy.inputs()
    walk = walked(model, inputs, set(model.state_dict()))
    return model, inputs, groups_of(walk, exact=True), groups_of(walk, exact=False)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return dict((*model.named_parameters(), *model.named_buffers()))


def wide(item: Any) -> Any:
    return item.double() if isinstance(item, Tensor) and item.is_floating_point() else item


@torch.no_grad()
def eager(model: nn.Module, inputs: Any) -> list[Tensor]:
    """The outputs in float64."""
    model, inputs = copy.deepcopy(model).double(), tree_map(wide, inputs)
    found = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return [x.double() for x in tree_leaves(found)]


def zeroed(model: nn.Module, groups: Groups, gone: Any) -> nn.Module:
    model = copy.deepcopy(model)
    with torch.no_grad():
        for (name, axis), kept in groups.cuts(gone).items():
            tensor = tensors_of(model)[name]
            tensor.index_fill_(axis, torch.tensor([k for k in range(tensor.shape[axis]) if k not in kept]), 0)
    return model


def apart(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest difference, relative to the largest value."""
    assert [x.shape for x in found] == [x.shape for x in wanted]
    largest = max(float(x.abs().max()) for x in wanted)
    return max(float((x - y).abs().max()) for x, y in zip(found, wanted, strict=True)) / largest
