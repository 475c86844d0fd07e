"""fold equalize=true: the same bits, equal ranges of channels, and nothing across what clips or adds."""

import itertools

import pytest
import torch
from test_fold import apart, notes, scrambled, task_for
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.core.history import undo
from tersor.core.run import run
from tersor.core.state import State
from tersor.maths.equalization import LIMIT, equalizing
from tersor.model.scaling_links import cells, scaling_links
from tersor.steps import Entropy, Fold, Prune, Quantize


class Separable(nn.Module):
    """conv - norm - relu - depthwise - norm - relu - pointwise, a grouped one, a pool, a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.depth, self.norm1 = nn.Conv2d(8, 16, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(16)
        self.point, self.group = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 12, 3, padding=1, groups=4)
        self.up, self.head = nn.Linear(12 * 4, 9), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm0(self.stem(x)))
        x = F.leaky_relu(self.norm1(self.depth(x)), 0.1)
        x = F.max_pool2d(self.group(self.point(x)), 2)
        return self.head(self.up(F.adaptive_avg_pool2d(x, 2).flatten(1)).relu())


PAIRS = [("stem", "depth"), ("depth", "point"), ("point", "group"), ("group", "up"), ("up", "head")]
SHAPE = (3, 9, 9)


def spread(seed: int = 0) -> Separable:
    """Channels of very different sizes, and layers that undo that."""
    net = scrambled(Separable(), seed)
    assert isinstance(net, Separable)
    with torch.no_grad():
        for norm, weight in ((net.norm0, net.depth.weight), (net.norm1, net.point.weight)):
            size = 10 ** torch.linspace(-2, 2, len(norm.weight)).double()
            norm.weight *= size
            norm.bias *= size
            back = size.repeat_interleave(2)[:, None] if norm is net.norm0 else size
            weight /= back[..., None, None]
    return net


def ranges(state: State, first: str, second: str) -> tuple[Tensor, Tensor]:
    """The largest |weight| of each channel between two layers, by a slow loop over the second."""
    layers = dict(state.plain().named_modules())
    w, v = layers[first].weight, layers[second].weight
    rows = w.abs().flatten(1).amax(1)
    groups = getattr(layers[second], "groups", 1)
    block = v.shape[1] * groups // len(w)
    columns = torch.zeros(len(w), dtype=w.dtype)
    for o, i in itertools.product(range(len(v)), range(v.shape[1])):
        channel = (o // (len(v) // groups) * v.shape[1] + i) // block
        columns[channel] = max(columns[channel], v[o, i].abs().max())
    return rows, columns


@pytest.mark.parametrize("seed", [0, 1])
def test_the_same_function_and_equal_ranges(seed: int) -> None:
    net = spread(seed)
    folded = run(net, [Fold()], task_for(*SHAPE))
    result = run(net, [Fold(), Fold(norms=False, dead=False, equalize=True)], task_for(*SHAPE))
    assert apart(result, net, *SHAPE) < 1e-9
    assert apart(result, folded.model(), *SHAPE) == 0  # powers of two: the same bits
    assert not notes(result, "refused")
    for first, second in PAIRS:
        rows, columns = ranges(result, first, second)
        ratio = (rows / columns).log2()
        assert ratio.abs().max() <= 2.5, (first, ratio)
    for first, second in PAIRS[:2]:
        rows, columns = ranges(folded, first, second)
        assert (rows / columns).log2().abs().max() > 5


def test_one_grid_for_a_tensor_fits_better() -> None:
    net, task = spread(), task_for(*SHAPE)
    steps = [Quantize(bits=8, per="tensor", where=("*", "!head*"))]
    plain, equal = (run(net, [Fold(equalize=word), *steps], task) for word in (False, True))
    assert apart(equal, net, *SHAPE) < 0.2 * apart(plain, net, *SHAPE)


class Clipped(nn.Module):
    """What is not homogeneous, and what has two readers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(4, 4, 1) for _ in range(4))
        self.e, self.f = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.a(x))
        x = self.b(x).sigmoid()
        y = F.relu(self.c(x))
        x = y + self.d(y)
        return self.f(self.e(x) + 1)


def test_what_clips_saturates_or_adds_is_left_and_named() -> None:
    net, x = scrambled(Clipped()), torch.randn(2, 4, 5, 5).double()
    links, left = scaling_links(net, (x,))
    assert links == []
    assert left == {
        "a.weight": "relu6 depends on the scale", "b.weight": "sigmoid depends on the scale",
        "c.weight": "several operators read it", "d.weight": "add depends on the scale",
        "e.weight": "add depends on the scale", "f.weight": "it is an output",
    }  # fmt: skip
    result = run(net, [Fold(equalize=True)], task_for(4, 5, 5))
    (text,) = notes(result, "equalized")
    assert "0 pairs of layers" in text
    assert "a.weight: relu6 depends on the scale" in text
    assert apart(result, net, 4, 5, 5) == 0


def test_shared_layers_are_left() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(self.a(x)))

    links, _ = scaling_links(scrambled(Shared()), (torch.randn(2, 4).double(),))
    assert links == []


def test_where_masks_coded_weights_and_undo() -> None:
    net, task = spread(), task_for(*SHAPE)
    result = run(net, [Prune(keep=0.5), Entropy(), Fold(equalize=True, where=("depth*", "point*"))], task)
    folded = run(net, [Prune(keep=0.5), Entropy(), Fold(where=("depth*", "point*"))], task)
    assert apart(result, folded.model(), *SHAPE) == 0
    changed = {name for name, form in result.forms.items() if form.digest != folded.forms[name].digest}
    assert changed == {"depth.weight", "depth.bias", "point.weight"}
    for name in changed - {"depth.bias"}:
        assert result.forms[name].name == folded.forms[name].name
    assert undo(result).digest == undo(folded).digest


def test_scales_by_hand() -> None:
    first, second = torch.tensor([[8.0, 1.0], [0.5, 0.25], [0.0, 0.0]]), torch.tensor([[0.5, 2.0, 3.0]])
    (power,) = equalizing([first, second], [(0, 1)])
    assert power.tolist() == [2, -1, 0]  # sqrt(16), sqrt(1 / 4), and a channel that nothing makes
    (power,) = equalizing([torch.tensor([[1e30]]), torch.tensor([[1e-30]])], [(0, 1)])
    assert power.tolist() == [LIMIT]
    chain = [torch.tensor([[64.0]]), torch.tensor([[1.0]]), torch.tensor([[1.0]])]
    powers = torch.stack(equalizing(chain, [(0, 1), (1, 2)]))[:, 0].tolist()
    assert powers == [4, 2]  # 64 / 2^4 = 2^4 / 2^2 = 2^2


def test_cells_of_groups_and_blocks() -> None:
    weight = torch.tensor([1.0, -2, 3, -4, 5, -6, 7, -8]).reshape(2, 2, 2)  # [O, I / G, K]
    assert cells(weight, 2, 1).tolist() == [[2, 4, 0, 0], [0, 0, 6, 8]]
    assert cells(weight[..., 0], 1, 2).tolist() == [[3], [7]]
