"""Comparisons of modules and of a file: which positions count, and what a file does not show."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import tersor
from tersor.candidates.candidate import candidate
from tersor.candidates.compare import compare
from tersor.errors import TaskError
from tersor.model.task import Task
from tersor.report.comparison import compared_tables
from tersor.runtimes import onnxruntime as writer


def test_positions_that_do_not_count_have_no_decision() -> None:
    """Ignored targets and padding, counted by a loop."""

    class Tagger(nn.Module):
        def __init__(self, shift: float):
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)
            with torch.no_grad():
                for seed, weight in enumerate(self.parameters()):
                    weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)))
                self.head.bias += torch.tensor([shift, 0, 0])

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
            return {"logits": self.head(self.embed(input_ids)) + 0 * attention_mask[..., None]}

    ids = torch.arange(40).reshape(5, 8) % 9
    mask = (torch.arange(8)[None] < torch.tensor([8, 3, 5, 1, 7])[:, None]).long()
    labels = torch.where(torch.arange(40).reshape(5, 8) % 3 == 0, -100, ids % 3)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    task = Task("tags", evaluate=[batch], metric="token_accuracy")
    first, second = Tagger(0), Tagger(1.5)
    facts = compare(candidate("base", first), candidate("base", second), task)
    a, b = (model(ids, mask)["logits"].argmax(2) for model in (first, second))
    counts = [(r, c) for r in range(5) for c in range(8) if mask[r, c] and labels[r, c] != -100]
    equal = sum(bool(a[at] == b[at]) for at in counts)
    assert facts["decisions"] == {"same": equal, "of": len(counts)}
    assert 0 < equal < len(counts) < 40


@pytest.mark.wide
def test_tokens_as_targets_are_not_scored_for_a_file(tmp_path: Path) -> None:
    """A causal model's labels are its inputs. A file does not show that its scores are of the next token."""
    model = nn.Sequential(nn.Embedding(9, 9))
    ids = torch.arange(12).reshape(2, 6) % 9

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.model(input_ids)

    path = tmp_path / "m.onnx"
    writer.write(Named(), {"input_ids": ids}, path)
    of, batch = candidate(str(path)), {"input_ids": ids, "labels": ids}
    with pytest.raises(TaskError, match="targets are the input tokens themselves.*target="):
        compare(of, of, Task("tokens", evaluate=[batch], logits="classes"))
    shifted = Task(
        "tokens", evaluate=[batch], target=lambda batch: batch["labels"].roll(-1, 1), metric=per_sample,
        logits=lambda output: tersor.Logits(output, "classes", 2),
    )  # fmt: skip
    assert compare(of, of, shifted)["decisions"] == {"same": 12, "of": 12}


def per_sample(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(2) == target).float().mean(1)


def test_binary_decisions_and_outputs_of_other_shapes() -> None:
    """A yes or no for each of several labels; models that decide at other numbers of positions."""
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    a, b = nn.Linear(3, 2), nn.Linear(3, 2)
    with torch.no_grad():
        for seed, weight in enumerate((*a.parameters(), *b.parameters())):
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)))
        equal = int(((a(x) > 0) == (b(x) > 0)).sum())
    yes = Task(
        "yes or no", evaluate=[(x, x[:, :2] > 0)], logits="binary",
        metric=lambda output, target: ((output > 0) == target).float().mean(1),
    )  # fmt: skip
    facts = compare(candidate("base", a), candidate("base", b), yes)
    assert facts["decisions"] == {"same": equal, "of": 80}
    assert 0 < equal < 80
    other = Task("any", evaluate=[(x, x)], logits="binary", metric=lambda output, target: output.sum(1))
    facts = compare(candidate("base", a), candidate("base", nn.Linear(3, 3)), other)
    assert facts["decisions"] == {"why": "A decides at 80 positions, B at 120"}


def test_a_misfit_of_the_second_is_found_before_the_first_is_scored() -> None:
    calls = []

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            calls.append(len(x))
            return self.layer(x)

    batches = [(torch.randn(4, 3), torch.zeros(4, dtype=torch.int64))] * 5
    with pytest.raises(TaskError, match="do not fit the model Linear"):
        compare(candidate("base", Counts()), candidate("base", nn.Linear(7, 2)), Task("t", evaluate=batches))
    assert calls == [4]


def test_base_that_a_file_was_not_made_from_is_named(tmp_path: Path) -> None:
    """A factory that makes random weights is another network each time: a drop of -70 points was reported."""
    task = Task("classes", evaluate=[(torch.randn(40, 6), torch.arange(40) % 3)])
    given, other = nn.Linear(6, 3), nn.Linear(6, 3)
    tersor.save(tersor.run(given, tersor.Quantize(bits=6)), file := tmp_path / "m.tersor")
    for base, named in ((other, str(file)), (given, "")):
        for order in (1, -1):
            pair = [candidate("base", base), candidate(str(file), base)][::order]
            facts = compare(pair[0], pair[1], task)
            assert facts["strange"] == named
            said = [line for line in compared_tables(facts) if isinstance(line, str) and "made from" in line]
            assert bool(said) == bool(named)
    facts = compare(candidate("base", other), candidate("base", given), task)
    assert facts["strange"] == ""


@pytest.mark.parametrize("alone", [False, True])
def test_the_bytes_of_a_checkpoint_are_those_of_its_network(alone: bool, tmp_path: Path) -> None:
    """An optimizer beside it tripled them, and with them the ratio to a compressed file."""
    model = nn.Linear(100, 50)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(2, 100)).sum().backward()
    optimizer.step()
    whole = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
    torch.save(model.state_dict() if alone else whole, path := tmp_path / "checkpoint.pt")
    found = candidate(str(path), nn.Linear(100, 50))
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    if alone:
        assert found.nbytes == path.stat().st_size
    else:
        assert abs(found.nbytes - (tmp_path / "w.safetensors").stat().st_size) < 100
        assert path.stat().st_size > 2.5 * found.nbytes
    assert ("alone" in found.facts) is not alone
