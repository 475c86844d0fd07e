"""Models that keep their codes: outputs are the plain model's bit for bit, and their bytes are counted."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.core.run import run
from tersor.core.state import State, start
from tersor.errors import RefusedError, SettingError
from tersor.forms import Affine, Dense
from tersor.io.container import load
from tersor.io.container_writer import save
from tersor.model.packed_module import PackedTensor
from tersor.steps import Cluster, Entropy, Prune, Quantize


class Net(nn.Module):
    """Every kind of layer, a table that is tied to the output and read by the parent, and an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 36)
        self.conv1, self.conv2 = nn.Conv1d(36, 20, 3, padding=1), nn.Conv2d(1, 6, 3, padding=1)
        self.up = nn.ConvTranspose1d(20, 36, 3, padding=1)
        self.lstm = nn.LSTM(36, 18, bidirectional=True, batch_first=True)
        self.attention = nn.MultiheadAttention(36, 2, batch_first=True)
        self.fc, self.last = nn.Linear(36, 37), nn.Linear(37, 36)
        self.head = nn.Linear(36, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = self.up(F.relu(self.conv1(x.mT))).mT
        x = x + self.conv2(x[:, None]).mean(1)
        x = self.lstm(x)[0]
        x = x + self.attention(x, x, x)[0]
        x = self.last(F.relu(self.fc(x)))
        return self.head(x) + F.linear(x, self.embed.weight)


TOKENS = torch.arange(15).reshape(3, 5) % 40
LSTM = "its layer passes all weights to one call"


def net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().eval()


def packed(state: State) -> nn.Module:
    with pytest.warns(UserWarning, match=f"stay floats: lstm.weight_ih_l0 .{LSTM}"):
        return state.model(style="packed")


def same(a: nn.Module, b: nn.Module, x: Tensor) -> None:
    """Equal outputs. Sums of the same numbers may differ in the last bits, by where in memory they lie."""
    with torch.no_grad():
        one, other = a(x), b(x)
    assert one.dtype == other.dtype
    assert (one - other).abs().max() <= 16 * torch.finfo(one.dtype).eps * other.abs().max()


def nbytes(model: nn.Module) -> int:
    """Of all parameters and buffers, each memory once."""
    found = {t.data_ptr(): t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())}
    return sum(found.values())


GRIDS = {
    "4 bits": {"bits": 4, "per": "group", "group": 12},
    "3 bits": {"bits": 3, "per": "group", "group": 7, "symmetric": False},
    "8 bits": {"bits": 8, "symmetric": False},
    "2 bits": {"bits": 2, "per": "tensor"},
    "1 bit": {"bits": 1, "symmetric": False},
    "5 bits": {"bits": 5, "range": "mse"},
}


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
def test_outputs_are_the_plain_models(grid: str, masks: bool) -> None:
    steps = [Prune(keep=0.5)] * masks + [Quantize(**GRIDS[grid])]
    state = run(net(), steps)
    model, plain = packed(state), state.model()
    same(model, plain, TOKENS)
    for name, parameter in plain.named_parameters(remove_duplicate=False):
        module, _, key = name.rpartition(".")
        assert torch.equal(getattr(model.get_submodule(module), key), parameter), name


def test_four_bits_take_four_bits() -> None:
    state = run(net(), [Quantize(bits=4)])
    model = packed(state)
    expected = 0
    for name, form in state.forms.items():
        count = form.decode().numel()
        rows = form.decode().shape[form.axis] if isinstance(form, Affine) else 0
        expected += 4 * count if not rows or "lstm" in name else -(-count // 2) + 4 * rows
    assert nbytes(model) == expected
    assert nbytes(model) < 0.5 * nbytes(state.model())
    assert model.head.weight_packed is model.embed.weight_packed


def test_the_given_model_and_the_state_stay_as_they_are() -> None:
    given = net()
    state = run(given, [Quantize(bits=4)])
    before = state.digest
    packed(state)
    assert type(given.fc) is nn.Linear
    assert state.digest == before


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def stated(model: nn.Module) -> nn.Module:
    other = run(net(), [Quantize(bits=4, range="mse")])
    made = packed(other)
    assert not torch.equal(made(TOKENS), model(TOKENS))
    made.load_state_dict(model.state_dict())
    return made


@pytest.mark.parametrize("way", [copied, pickled, saved, stated])
def test_copies_compute_the_same_and_keep_ties(way: object) -> None:
    model = packed(run(net(), [Quantize(bits=4)]))
    again = way(model)
    same(again, model, TOKENS)
    assert nbytes(again) == nbytes(model)
    assert again.head.weight_packed is again.embed.weight_packed
    assert isinstance(again.fc, nn.Linear)
    one, other = ({t.data_ptr() for t in m.buffers() if t.numel()} for m in (again, model))
    assert not one & other


def test_other_dtypes_and_devices() -> None:
    state = run(net(), [Quantize(bits=4, symmetric=False)])
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        model, plain = packed(state).to(dtype), state.model().to(dtype)
        assert torch.equal(model.head.weight, plain.head.weight)
        same(model, plain, TOKENS)
        assert torch.equal(model.float().head.weight, state.model().head.weight), "nothing was lost"
    assert model.to("meta").fc.weight.device.type == "meta"


def test_a_file_gives_the_same(tmp_path: object) -> None:
    state = run(net(), [Prune(keep=0.5), Quantize(bits=4), Entropy()])
    save(state, tmp_path / "m.tersor")
    with pytest.warns(UserWarning, match="stay floats"):
        again = load(tmp_path / "m.tersor").model(net(), style="packed")
    same(again, state.model(), TOKENS)


def test_groups_in_any_order() -> None:
    """A cut that permutes columns leaves a table of groups."""
    w = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    codes = Dense((w * 3).round().clamp(-7, 7).to(torch.int8))
    form = Affine(codes, Dense(torch.rand(4, 3) + 0.5), bits=4, group=2)
    cut = form.take(1, torch.tensor([5, 0, 3, 1, 4]))
    assert torch.equal(PackedTensor(cut, None, torch.float32).decode(), cut.decode())


def test_what_stays_plain_is_named() -> None:
    class Loops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.inner = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            for child in self.children():
                x = child(x)
            return x @ self.w

    x = torch.randn(2, 8)
    state = run(Loops(), [Quantize(bits=4)])
    with pytest.warns(UserWarning, match=r"1 weights stay floats: w \(its module has layers of its own"):
        model = state.model(style="packed")
    same(model, state.model(), x)
    state = run(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), [Cluster(entries=8, where="0.*")])
    with pytest.warns(UserWarning, match=r"0.weight \(its form is codebook, not integers on a uniform grid"):
        model = state.model(style="packed")
    same(model, state.model(), x)
    state = run(nn.Sequential(nn.Linear(8, 8)), [Quantize(bits=9)])
    with pytest.warns(UserWarning, match=r"0.weight \(its codes have 9 bits, more than 8"):
        state.model(style="packed")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        start(nn.Sequential(nn.Linear(8, 8))).model(style="packed")  # floats were asked for


def test_styles_are_checked() -> None:
    state = run(nn.Sequential(nn.Linear(8, 8)), [Quantize(bits=4)])
    with pytest.raises(SettingError, match="model: style='pakced'; did you mean 'packed'"):
        state.model(style="pakced")
    model = state.model(style="packed")
    with pytest.raises(KeyError, match="weight"):
        model[0].weight = nn.Parameter(torch.zeros(8, 8))


def test_grids_on_edges_are_refused() -> None:
    from integer_nets import made

    net, task = made("mlp")
    state = run(net, [Quantize(activations=8)], task)
    with pytest.raises(RefusedError, match="style='packed', but edges have grids"):
        state.model(style="packed")
