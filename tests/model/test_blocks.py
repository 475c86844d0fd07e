"""Blocks: which layers are rounded together, in networks of the usual kinds."""

import torch
from torch import Tensor, nn

from tersor.model.blocks import Block, blocks_of, common
from tersor.model.graph import traced


class Basic(nn.Module):
    """A block of a ResNet."""

    def __init__(self, ins: int, outs: int):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(ins, outs, 3, padding=1), nn.Conv2d(outs, outs, 3, padding=1)
        self.short = nn.Identity() if ins == outs else nn.Conv2d(ins, outs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv2(self.conv1(x).relu()) + self.short(x)).relu()


class Attend(nn.Module):
    """A residual branch of its own, with its addition inside."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out((self.query(x) @ self.key(x).mT).softmax(-1) @ x)


class Encoder(nn.Module):
    """A transformer's layer: two residual branches, one of them in a module of its own."""

    def __init__(self, more: int = 0) -> None:
        super().__init__()
        self.attend, self.fc1, self.fc2 = Attend(), nn.Linear(6, 12), nn.Linear(12, 6)
        self.more = nn.Sequential(*(nn.Linear(12, 12) for _ in range(more)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.attend(x)
        return x + self.fc2(self.more(self.fc1(x).relu()))


def layers(net: nn.Module) -> list[str]:
    return [path for path, module in net.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]


def found(net: nn.Module, x: Tensor | None) -> list[Block]:
    return blocks_of(net, None if x is None else traced(net, (x,)), layers(net))


def names(net: nn.Module, x: Tensor | None) -> list[tuple[str, int]]:
    return [(block.name, len(block.layers)) for block in found(net, x)]


def resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Sequential(Basic(4, 4), Basic(4, 6), Basic(6, 6)), nn.Flatten(),
        nn.Linear(6 * 36, 5),
    )  # fmt: skip


def test_residual_blocks_with_and_without_layers_in_the_shortcut() -> None:
    net, x = resnet(), torch.randn(2, 3, 8, 8)
    assert names(net, x) == [("1.0", 2), ("1.1", 3), ("1.2", 2)]
    assert names(net, None) == [("1.0", 2), ("1.1", 3), ("1.2", 2)], "a module of a few layers is a run"


def test_the_outermost_residual_block_that_is_not_too_large() -> None:
    x = torch.randn(2, 5, 6)
    assert names(nn.Sequential(Encoder(), Encoder()), x) == [("0", 5), ("1", 5)]
    (one, *rest) = names(nn.Sequential(Encoder(more=6)), x)
    assert one == ("0.attend", 3)
    assert rest == [("0.more.0 to 0.more.3", 4), ("0.more.4 to 0.more.5", 2)]


def test_neighbors_in_a_sequential_are_runs_with_what_is_between() -> None:
    net = nn.Sequential(*(m for _ in range(5) for m in (nn.Linear(4, 4), nn.ReLU())), nn.Linear(4, 2))
    assert names(net, torch.randn(3, 4)) == [("0 to 7", 4), ("8 to 10", 2)]
    (first, last) = found(net, torch.randn(3, 4))
    assert first.modules == tuple(map(str, range(8)))
    x = torch.randn(3, 4)
    assert torch.equal(last.of(net)(first.of(net)(x)), net(x))
    assert last.inner("10.weight") == "2.weight"
    assert first.of(net).get_parameter(first.inner("6.bias")) is net[6].bias


def test_a_sequential_of_another_class_is_no_run() -> None:
    class Odd(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[1](self[0](x)) + self[0](x)

    net = nn.Sequential(Odd(*(nn.Linear(4, 4) for _ in range(6))), nn.Linear(4, 2))
    assert names(net, None) == []


def test_a_small_network_is_a_block_and_a_layer_alone_is_none() -> None:
    x = torch.randn(2, 5, 6)
    net = Encoder()
    assert found(net, x) == [Block(("",), tuple(layers(net)))]
    assert found(net, x)[0].name == "the model"
    assert found(net, x)[0].inner("attend.out.bias") == "attend.out.bias"
    assert names(nn.Sequential(nn.Linear(6, 6)), x) == []


def test_only_layers_that_are_rounded_count() -> None:
    net, x = resnet(), torch.randn(2, 3, 8, 8)
    some = [path for path in layers(net) if path != "1.0.conv1"]
    made = blocks_of(net, traced(net, (x,)), some)
    assert [block.name for block in made] == ["1.1", "1.2"]


def test_the_innermost_module_around_several() -> None:
    assert common(["a.b.c", "a.b", "a.b.d.e"]) == "a.b"
    assert common(["a.b", "a.bc"]) == "a"
    assert common(["a", ""]) == ""
