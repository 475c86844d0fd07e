"""Channel order: the same function for any operators between two layers; similar units become neighbors."""

import pytest
import torch
from permuted import difference, randomized
from torch import nn
from torch.nn import functional as F
from unit_cases import UNITS, conv, ends, net

from tersor.errors import RefusedError
from tersor.forms import Dense
from tersor.model.channel_order import Link, arranged, links, order
from tersor.steps.penalize import nbytes_of


class Lenet(nn.Module):
    """Two convolutions and two linear layers, with functions between them."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 6, 3)
        self.c, self.d = nn.Linear(6 * 4, 9), nn.Linear(9, 3)

    def forward(self, x):
        x = F.relu(self.norm(F.max_pool2d(self.a(x), 2)))
        x = F.max_pool2d(self.b(x), 2).view(x.shape[0], -1)
        return self.d(torch.tanh(self.c(x)))


class Skip(nn.Module):
    """Units with two readers are not permuted."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x):
        y = self.a(x)
        return self.d(F.relu(self.c(y + F.relu(self.b(y)))))


def sparse(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * (torch.rand(p.shape) < 0.4))
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.copy_(torch.randn(layer.num_features))
                layer.running_var.copy_(torch.rand(layer.num_features) + 0.5)
    return model.eval()


MODELS = {
    "mlp": (nn.Sequential(nn.Linear(7, 8), nn.GELU(), nn.Dropout(), nn.Linear(8, 5)), (7,)),
    "lenet": (Lenet(), (1, 14, 14)),
    "skip": (Skip(), (6,)),
    "grouped": (nn.Sequential(nn.Conv1d(2, 6, 3), nn.ReLU(), nn.Conv1d(6, 6, 3, groups=2)), (2, 9)),
    "softmax": (nn.Sequential(nn.Linear(7, 8), nn.Softmax(1), nn.Linear(8, 5)), (7,)),
    "tokens": (nn.Sequential(nn.Linear(7, 8), nn.ReLU(), nn.Linear(8, 5)), (4, 7)),
    "flat": (nn.Sequential(nn.Conv1d(2, 6, 3), nn.Flatten(), nn.ReLU(), nn.Linear(42, 5)), (2, 9)),
}
LINKS = {
    "mlp": [("0", (), "3", 1)],
    "lenet": [("a", ("norm",), "b", 1), ("b", (), "c", 4), ("c", (), "d", 1)],
    "skip": [("c", (), "d", 1)],
    "grouped": [],  # each group reads only its own inputs
    "softmax": [],  # not known to treat its inputs alike
    "tokens": [("0", (), "2", 1)],
    "flat": [("0", (), "3", 7)],
}


@pytest.mark.parametrize("name", MODELS)
def test_the_network_computes_the_same(name):
    model, shape = MODELS[name]
    model, x = sparse(model), torch.randn(16, *shape, generator=torch.Generator().manual_seed(1))
    found = links(model, (x,))
    assert [ends(one) for one in found] == LINKS[name]
    before = model(x)
    forms = {key: Dense(value.clone()) for key, value in model.state_dict().items()}
    new = arranged(forms, found)
    assert bool(new) == bool(found)
    model.load_state_dict({key: form.decode() for key, form in {**forms, **new}.items()})
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    assert arranged({**forms, **new}, []) == {}


def test_a_model_that_cannot_be_traced_is_refused():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.b(self.a(x)) if x.sum() > 0 else x

    with pytest.raises(RefusedError, match=r"torch\.export cannot trace the model"):
        links(Branch(), (torch.zeros(2, 3),))


def test_each_unit_is_followed_by_the_most_similar_one_left():
    g = torch.Generator().manual_seed(2)
    rows, columns = torch.randn(9, 12, generator=g), torch.randn(9, 4, generator=g)
    rows[rows.abs() < 0.6] = 0
    rows[4], columns[4] = 0, 0
    found = order(rows, columns).tolist()
    parts = rows / rows.square().sum() ** 0.5, 0.3 * columns / columns.square().sum() ** 0.5

    def likeness(u: int, v: int) -> float:
        dot = sum(float(p * q) for m in parts for p, q in zip(m[u], m[v], strict=True))
        sizes = [sum(float(p * p) for m in parts for p in m[w]) ** 0.5 for w in (u, v)]
        return dot / (sizes[0] * sizes[1])

    left = set(range(9)) - {4}
    at = max(left, key=lambda k: int((rows[k] != 0).sum()))
    for k, unit in enumerate(found[:-1]):
        at = max(left, key=lambda v: likeness(found[k - 1], v)) if k else at
        assert unit == at
        left.remove(unit)
    assert found[-1] == 4


def test_similar_neighboring_rows_need_fewer_bytes():
    """Rows of four patterns in a random order, with some noise: sorted, they need about half of the bytes."""
    g = torch.Generator().manual_seed(3)
    patterns = (torch.rand(4, 120, generator=g) < 0.1) * torch.randn(4, 120, generator=g).sign()
    kind = torch.randint(4, (80,), generator=g)
    rows = patterns[kind] * (torch.rand(80, 120, generator=g) < 0.9)
    forms = {"0.weight": Dense(rows.to(torch.int8).float()), "2.weight": Dense(torch.ones(3, 80))}
    new = arranged(forms, [Link(("0.weight",), "2.weight", 1)])

    def size(found):
        return nbytes_of({"w": Dense(found["0.weight"].decode().to(torch.int8))})

    assert size(new) < 0.75 * size(forms)


@pytest.mark.sampled
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", UNITS)
def test_only_units_that_are_treated_alike_are_permuted(name: str, training: bool) -> None:
    make, shape, expected = UNITS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).double()
    model = randomized(make().double(), x).train(training)
    for layer in model.modules():
        if isinstance(layer, nn.modules.dropout._DropoutNd):
            layer.eval()  # dropout is random
    assert [ends(one) for one in links(model, (x,))] == expected
    moved, found = difference(model, (x,))
    assert found == len(expected)
    assert moved <= 1e-12


# --- other kinds of models ---


def in_place(self, x):
    y = F.relu_(self.norm(self.a(x)))
    y = self.b(y).clamp_(min=0)
    y += x
    return {"scores": self.c(y.flatten(1)), "more": (y.sum((1, 2, 3)),)}


def functional(self, x):
    x = F.linear(x, self.v, self.bias)
    x = x.mul(2).add_(0.5)
    F.relu_(x)
    return F.linear(x[:, None], self.w)[:, 0]


def block(self, x):  # [B, T, I]
    q, k, v = self.qkv(x).chunk(3, 2)
    x = x + self.out(F.scaled_dot_product_attention(q, k, v))
    return x + self.down(F.dropout(F.gelu(self.up(self.norm(x))), 0.5, self.training))


def bare() -> nn.Module:
    model = net(functional)
    for name, shape in {"v": (6, 6), "bias": (6,), "w": (3, 6)}.items():
        model.register_parameter(name, nn.Parameter(torch.randn(shape)))
    return model


OTHERS = {
    "in place": (
        lambda: net(in_place, a=conv(), norm=nn.BatchNorm2d(6), b=conv(), c=nn.Linear(150, 2)), (5, 6, 5, 5),
        [Link(("a.weight", "a.bias", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"),
              "b.weight", 1)]),
    "functional": (bare, (5, 6), [Link(("v", "bias"), "w", 1)]),
    "transformer": (
        lambda: net(block, qkv=nn.Linear(6, 18), out=nn.Linear(6, 6), norm=nn.LayerNorm(6),
                    up=nn.Linear(6, 12), down=nn.Linear(12, 6)), (3, 4, 6),
        [Link(("up.weight", "up.bias"), "down.weight", 1)]),
    "encoder": (
        lambda: nn.TransformerEncoderLayer(6, 2, 12, batch_first=True), (3, 4, 6),
        [Link(("linear1.weight", "linear1.bias"), "linear2.weight", 1)]),
    "rows of a batch": (
        lambda: net(
            lambda self, x: self.b(F.relu(self.a(x).view(-1, 8))), a=nn.Linear(6, 8), b=nn.Linear(8, 2)),
        (3, 4, 6), [Link(("a.weight", "a.bias"), "b.weight", 1)]),
    "heads": (
        lambda: net(lambda self, x: self.b(self.a(x).view(5, 3, 2)), a=nn.Linear(6, 6), b=nn.Linear(2, 2)),
        (5, 6), []),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_kinds_of_models(name: str) -> None:
    make, shape, expected = OTHERS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).double()
    model = randomized(make().double(), x)
    assert links(model, (x,)) == expected
    moved, found = difference(model, (x,))
    assert found == len(expected)
    assert moved <= 1e-12
