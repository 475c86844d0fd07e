"""Small models whose hidden units may or may not be permuted: (model, shape of input, ends of links)."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from tersor.model.channel_order import Link

Ends = tuple[str, tuple[str, ...], str, int]  # the layers of a link: first, norms, second; and its block


def net(forward, **layers: nn.Module) -> nn.Module:
    """A module with these layers and this forward(self, x)."""
    model = type("Net", (nn.Module,), {"forward": forward})()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return model


def ends(link: Link) -> Ends:
    """The layers of these tensors; the tensors of each layer are adjacent."""
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in link.rows))
    return layers[0], tuple(layers[1:]), link.columns.removesuffix(".weight"), link.block


def conv(units: int = 6, more: int = 6, **settings) -> nn.Conv2d:
    return nn.Conv2d(units, more, 3, padding=1, **settings)


def line(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


def twice(self, x):
    return self.b(F.relu(self.a(F.relu(self.a(x)))))


def shared_norm(self, x):
    return self.c(self.norm(self.b(self.norm(self.a(x)))))


def shuffled(self, x):
    x = self.a(x)
    return self.b(x.view(x.shape[0], 2, 3, 5, 5).transpose(1, 2).reshape(x.shape[0], 6, 5, 5))


def chunked(self, x):
    left, right = self.a(x).chunk(2, 1)
    return self.b(left * right)


def split(self, x):
    left, right = torch.split(self.a(x), [2, 4], 1)
    return self.b(torch.cat([right, left], 1))


def read_twice(self, x):
    x = F.relu(self.a(x))
    return self.b(x) + self.c(x)


def shown(self, x):
    x = F.relu(self.a(x))
    return self.b(x), x


def pooled_units(self, x):
    return self.b(F.max_pool1d(self.a(x), 3, 1, 1))


def pooled_places(self, x):
    x = self.a(x)
    return self.b(F.max_pool2d(x, 3, 1, 1))


def indices(self, x):
    x, _ = self.pool(self.a(x))
    return self.b(x)


def unbatched(self, x):
    return self.b(F.relu(self.a(x[0])))


def as_input(self, a):
    return self.b(F.relu(self.a(a)))


def as_method(self, x):
    return self.relu(self.a(x).relu())


def as_size(self, x):
    x = self.a(x)
    return self.size(x), self.b(x)


def weight_read(self, x):
    return self.b(F.relu(self.a(x))) + self.a.weight.sum(1)


def norm_read(self, x):
    return self.b(F.relu(self.norm(self.a(x)))) + self.norm.running_mean.sum()


def flat_pooled(self, x):
    return self.b(torch.flatten(F.adaptive_avg_pool2d(F.relu(self.a(x)), 2), 1))


def hooked_relu() -> nn.Module:
    relu = nn.ReLU()
    relu.register_forward_hook(lambda module, given, out: out * torch.arange(6.0))
    return relu


def hooked_layer() -> nn.Module:
    layer = nn.Linear(6, 6)
    layer.register_forward_pre_hook(lambda module, given: (given[0].flip(1),))
    return layer


def own_forward() -> nn.Module:
    relu = nn.ReLU()
    relu.forward = lambda x: x.cumsum(1)
    return relu


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    return model


FLAT, IMAGE = (5, 6), (5, 6, 5, 5)
AB = [("a", (), "b", 1)]
UNITS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[Ends]]] = {
    "grouped first": (lambda: line(conv(groups=2), nn.ReLU(), conv()), IMAGE, []),
    "grouped first, with a norm": (
        lambda: line(conv(groups=3), nn.BatchNorm2d(6), nn.ReLU6(), conv()), IMAGE, []),
    "depthwise first": (lambda: line(conv(groups=6), nn.ReLU(), conv()), IMAGE, []),
    "grouped first, linear second": (
        lambda: line(conv(groups=2), nn.Flatten(), nn.Linear(150, 3)), IMAGE, []),
    "grouped second": (lambda: line(conv(), nn.ReLU(), conv(groups=3)), IMAGE, []),
    "depthwise between": (lambda: line(conv(), nn.ReLU(), conv(groups=6), nn.ReLU(), conv()), IMAGE, []),
    "transposed": (
        lambda: line(conv(), nn.ReLU(), nn.ConvTranspose2d(6, 6, 3), nn.ReLU(), conv()), IMAGE, []),
    "called twice": (lambda: net(twice, a=nn.Linear(6, 6), b=nn.Linear(6, 2)), FLAT, []),
    "a norm called twice": (
        lambda: net(shared_norm, a=conv(), b=conv(), c=conv(), norm=nn.BatchNorm2d(6)), IMAGE, []),
    "one weight in two layers": (tied, FLAT, []),
    "tokens": (
        lambda: line(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)), (5, 6, 6), [("0", (), "2", 1)]),
    "channel shuffle": (lambda: net(shuffled, a=conv(), b=conv()), IMAGE, []),
    "nn.ChannelShuffle": (lambda: line(conv(), nn.ChannelShuffle(2), conv()), IMAGE, []),
    "chunk": (lambda: net(chunked, a=conv(6, 12), b=conv()), IMAGE, []),
    "split": (lambda: net(split, a=conv(), b=conv()), IMAGE, []),
    "glu": (lambda: line(conv(6, 12), nn.GLU(1), conv()), IMAGE, []),
    "pixel shuffle": (lambda: line(conv(6, 8), nn.PixelShuffle(2), conv(2, 3)), IMAGE, []),
    "group norm": (lambda: line(conv(), nn.GroupNorm(2, 6), nn.ReLU(), conv()), IMAGE, []),
    "layer norm": (lambda: line(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 2)), FLAT, []),
    "instance norm": (lambda: line(conv(), nn.InstanceNorm2d(6, affine=True), conv()), IMAGE, []),
    "prelu": (lambda: line(conv(), nn.PReLU(6), conv()), IMAGE, []),
    "softmax over units": (lambda: line(nn.Linear(6, 6), nn.Softmax(1), nn.Linear(6, 2)), FLAT, []),
    "dropout2d": (lambda: line(conv(), nn.Dropout2d(), conv()), IMAGE, [("0", (), "2", 1)]),
    "a norm without numbers": (
        lambda: line(conv(), nn.BatchNorm2d(6, affine=False), conv()), IMAGE, [("0", ("1",), "2", 1)]),
    "flat and pooled": (
        lambda: net(flat_pooled, a=conv(), b=nn.Linear(24, 3)), IMAGE, [("a", (), "b", 4)]),
    "read twice": (
        lambda: net(read_twice, a=nn.Linear(6, 6), b=nn.Linear(6, 2), c=nn.Linear(6, 2)), FLAT, []),
    "shown": (lambda: net(shown, a=nn.Linear(6, 6), b=nn.Linear(6, 2)), FLAT, []),
    "the last": (lambda: line(nn.Linear(6, 6), nn.ReLU()), FLAT, []),
    "units are pooled": (lambda: net(pooled_units, a=nn.Linear(6, 6), b=nn.Linear(6, 2)), FLAT, []),
    "units are pooled with places": (
        lambda: net(pooled_places, a=nn.Conv1d(6, 6, 1), b=nn.Conv1d(6, 2, 1)), (5, 6, 7), []),
    "indices": (
        lambda: net(indices, a=conv(), pool=nn.MaxPool2d(2, return_indices=True), b=conv()), IMAGE, []),
    "no batch": (lambda: net(unbatched, a=nn.Conv1d(6, 6, 1), b=nn.Conv1d(6, 6, 1)), (1, 6, 6), []),
    "an input named as a layer": (lambda: net(as_input, a=nn.Linear(6, 6), b=nn.Linear(6, 2)), FLAT, AB),
    "a method named as a layer": (
        lambda: net(as_method, a=nn.Linear(6, 6), relu=nn.Linear(6, 2)), FLAT, [("a", (), "relu", 1)]),
    "a layer named size": (
        lambda: net(as_size, a=nn.Linear(6, 6), b=nn.Linear(6, 2), size=nn.Linear(6, 2)), FLAT, []),
    "a weight is read too": (lambda: net(weight_read, a=nn.Linear(6, 6), b=nn.Linear(6, 6)), FLAT, []),
    "a norm is read too": (
        lambda: net(norm_read, a=conv(), norm=nn.BatchNorm2d(6), b=conv()), IMAGE, []),
    "a hook between": (lambda: line(nn.Linear(6, 6), hooked_relu(), nn.Linear(6, 2)), FLAT, []),
    "a hook on the second": (lambda: line(nn.Linear(6, 6), nn.ReLU(), hooked_layer()), FLAT, []),
    "a forward of its own": (lambda: line(nn.Linear(6, 6), own_forward(), nn.Linear(6, 2)), FLAT, []),
    "a weight that a hook makes": (
        lambda: line(nn.utils.weight_norm(nn.Linear(6, 6)), nn.ReLU(), nn.Linear(6, 2)), FLAT, []),
    "a weight that is made": (
        lambda: line(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)), nn.Linear(6, 2)), FLAT, []),
}  # fmt: skip
