"""Entropy: the same bits in fewer bytes, never in more, for every leaf."""

import pytest
import torch
from tiny import MODELS, tiny
from torch import Tensor, nn

from tersor.core.run import run
from tersor.core.state import State
from tersor.errors import SettingError, SiteError
from tersor.forms import Coded, Dense, Masked
from tersor.forms.form import as_bytes
from tersor.steps import Cluster, Entropy, Factorize, Prune, Quantize


def same_bits(a: State, b: State) -> None:
    for name, form in a.forms.items():
        assert bytes(as_bytes(form.decode())) == bytes(as_bytes(b.forms[name].decode())), name
        assert form.decode().dtype is b.forms[name].decode().dtype


@pytest.mark.parametrize("coder", ["max", "fast", "huffman", "rans"])
@pytest.mark.parametrize("model", MODELS)
def test_lossless_and_never_larger(model: str, coder: str) -> None:
    t = tiny(model)
    given = run(t.model, [Prune(keep=0.3), Quantize(bits=3)])
    result = run(given, Entropy(coder=coder))
    same_bits(result, given)
    for name, form in result.forms.items():
        assert form.nbytes <= given.forms[name].nbytes
    assert {entry.how for entry in result.ledger.edits(-1)} <= {"lossless"}
    assert torch.equal(t.out(result.model()), t.out(given.model()))


class Wide(nn.Module):
    """A model with enough weights for a coder to shorten them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def wide() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Wide()


STACKS = {
    "quantize": [Quantize(bits=4)],
    "cluster": [Cluster(entries=4)],
    "prune": [Prune(keep=0.1)],
    "prune, cluster": [Prune(keep=0.1), Cluster(entries=4)],
    "factorize, prune, quantize": [Factorize(keep=0.5), Prune(keep=0.5), Quantize(bits=4)],
}


@pytest.mark.parametrize("name", STACKS)
def test_stacks_shrink_to_near_their_entropy(name: str) -> None:
    given = run(wide(), STACKS[name])
    result = run(given, Entropy(coder="huffman"))
    same_bits(result, given)
    assert result.forms["fc.weight"].nbytes < given.forms["fc.weight"].nbytes
    if name == "cluster":
        index = given.forms["fc.weight"].index.decode()
        shares = torch.bincount(index.flatten().long()).double() / index.numel()
        bits = float(-(shares * shares.log2()).sum()) * index.numel()
        assert result.forms["fc.weight"].index.nbytes <= bits / 8 * 1.1 + 32


def test_masked_elements_are_not_stored() -> None:
    given = run(wide(), [Prune(keep=0.1), Cluster(entries=4)])
    form = run(given, Entropy(coder="huffman")).forms["fc.weight"]
    assert isinstance(form, Masked)
    assert isinstance(form.keep, Coded)
    index = form.body.index
    assert isinstance(index, Coded)
    assert index.kept
    kept = int(form.keep.decode().sum())
    assert index.nbytes <= kept * 2 / 8 + 40


def test_a_second_run_changes_nothing() -> None:
    once = run(wide(), [Quantize(bits=4), Entropy()])
    twice = run(once, Entropy())
    assert not list(twice.ledger.edits(-1))
    assert twice.digest == once.digest
    assert all("no coder shortens its" in entry.text for entry in twice.ledger.notes("skipped", -1))


def test_a_worse_coder_does_not_replace_a_better_one() -> None:
    once = run(wide(), [Prune(keep=0.02), Quantize(bits=2), Entropy()])
    again = run(once, Entropy(coder="huffman"))
    for name, form in again.forms.items():
        assert form.nbytes <= once.forms[name].nbytes


def test_a_better_coder_replaces_a_worse_one() -> None:
    steps = [Prune(keep=0.02), Quantize(bits=2)]
    first, whole = (run(wide(), [*steps, Entropy(coder=coder)]) for coder in ("huffman", "max"))
    again = run(first, Entropy())
    assert whole.forms["fc.weight"].nbytes < first.forms["fc.weight"].nbytes
    assert again.digest == whole.digest


def test_notes_have_bytes() -> None:
    given = run(wide(), Quantize(bits=4))
    result = run(given, Entropy(coder="huffman"))
    note = next(entry for entry in result.ledger.notes("done", -1) if entry.site == "fc.weight")
    before, after = given.forms["fc.weight"].nbytes, result.forms["fc.weight"].nbytes
    assert (note.text, note.data) == (f"{before} to {after} bytes", {"before": before, "after": after})


def test_everything_is_coded_by_default() -> None:
    model = wide()
    model.register_buffer("table", torch.zeros(500, dtype=torch.int64))
    model.register_buffer("flags", torch.zeros(4000, dtype=torch.bool))
    result = run(model, Entropy(coder="huffman"))
    assert isinstance(result.forms["table"], Coded)
    assert isinstance(result.forms["flags"], Coded)
    some = run(model, Entropy(coder="huffman", where="fc.weight"))
    assert isinstance(some.forms["table"], Dense)
    with pytest.raises(SiteError, match="did you mean"):
        run(model, Entropy(where="fc.wieght"))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.uint16, torch.float8_e5m2], ids=str)
def test_dtypes_that_have_no_code_stay_as_they_are(dtype: torch.dtype) -> None:
    model = wide()
    model.register_buffer("other", torch.zeros(300).to(dtype))
    result = run(model, [Quantize(bits=4), Entropy(coder="huffman")])
    assert isinstance(result.forms["other"], Dense)
    assert result.model().get_buffer("other").dtype is dtype
    kinds = [entry.kind for entry in result.ledger.entries if entry.site == "other"]
    assert kinds == ["skipped"]


def test_bad_coder() -> None:
    with pytest.raises(SettingError, match=r"entropy: coder='hufman'; did you mean 'huffman'\?"):
        Entropy(coder="hufman")
