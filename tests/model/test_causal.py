"""Causal language models without their own loss: labels are inputs, and scores predict the next token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stand_ins import Answer
from torch import Tensor, nn
from torch.nn import functional as F

import tersor
from tersor.model.losses import takes_labels


class CausalLMOutput(Answer):
    """The output class of Hugging Face's causal models, recognized by its name."""


class Net(nn.Module):
    """Scores for 7 tokens; computes its own loss if it gets labels."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(7, 5), nn.Linear(5, 7)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> CausalLMOutput:
        logits = self.head(self.table(input_ids))
        return CausalLMOutput(logits, None if labels is None else by_hand(logits, labels))


class HandsOn(nn.Module):
    """Wraps like PEFT and torch.compile: any arguments."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


class Named(HandsOn):
    """A wrapper without labels."""

    def forward(self, input_ids: Tensor) -> Any:  # type: ignore[override]
        return self.inner(input_ids)


def by_hand(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean of -log p(next token) over the labels that count, in a loop."""
    terms = [
        -logits[b, t].log_softmax(-1)[labels[b, t + 1]]
        for b in range(labels.shape[0])
        for t in range(labels.shape[1] - 1)
        if labels[b, t + 1] != -100
    ]
    return torch.stack(terms).mean()


def batch() -> dict[str, Tensor]:
    """Two samples: a prompt of two tokens that does not count, and padding."""
    ids = torch.tensor([[1, 2, 3, 4, 5, 6], [6, 0, 5, 2, 1, 1]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def net(wrap: Any = nn.Identity) -> Any:
    torch.manual_seed(0)
    return Net() if wrap is nn.Identity else wrap(Net())


def feed(model: nn.Module, item: dict[str, Tensor]) -> Any:
    return model(item["input_ids"])


@pytest.mark.parametrize("wrap", [Named, HandsOn, nn.Identity, nn.DataParallel])
def test_the_default_loss_scores_the_next_token(wrap: Any) -> None:
    model, item = net(wrap), {key: one for key, one in batch().items() if key != "attention_mask"}
    task = tersor.Task(evaluate=[item], train=[item], metric="perplexity")
    want = by_hand(net()(item["input_ids"]).logits, item["labels"])
    assert float(task.loss_of(task.run(model, item), item).detach()) == pytest.approx(
        float(want.detach()), rel=1e-6
    )


def test_the_loss_of_the_next_token_leaves_out_padding() -> None:
    item = batch() | {"labels": batch()["input_ids"]}  # padding is marked by the mask only, not in the labels
    task = tersor.Task(evaluate=[item], train=[item], feed=feed)
    want = by_hand(
        net()(item["input_ids"]).logits, item["labels"].masked_fill(item["attention_mask"] == 0, -100)
    )
    assert float(task.loss_of(task.run(net(), item), item).detach()) == pytest.approx(
        float(want.detach()), rel=1e-6
    )


@pytest.mark.parametrize("wrap", [Named, HandsOn, nn.Identity])
@pytest.mark.parametrize("own", [False, True])
def test_metrics_score_the_next_token(wrap: Any, own: bool) -> None:
    item = batch()
    more = {"loss": lambda output, target: by_hand(output.logits, target)} if own else {}
    perplexity, share = (
        tersor.Task(evaluate=[item], metric=word, feed=feed, **more)  # type: ignore[arg-type]
        for word in ("perplexity", "token_accuracy")
    )
    model, logits = net(wrap), net()(item["input_ids"]).logits
    want = float(by_hand(logits, item["labels"]).detach().exp())
    assert perplexity.scored.of(perplexity.scores(model)) == pytest.approx(want, rel=1e-6)
    pairs = [
        int(logits[b, t].argmax()) == int(item["labels"][b, t + 1])
        for b in range(2)
        for t in range(5)
        if item["labels"][b, t + 1] != -100
    ]
    assert share.scored.of(share.scores(model)) == pytest.approx(sum(pairs) / len(pairs))


def test_labels_are_shifted_if_the_batch_has_no_tokens() -> None:
    class Embedded(Net):
        def forward(self, inputs_embeds: Tensor, labels: Tensor) -> CausalLMOutput:  # type: ignore[override]
            logits = self.head(inputs_embeds)
            return CausalLMOutput(logits, by_hand(logits, labels))

    item = {"inputs_embeds": torch.randn(2, 6, 5), "labels": batch()["labels"]}
    task, model = tersor.Task(evaluate=[item], metric="perplexity"), Embedded()
    want = float(by_hand(model.head(item["inputs_embeds"]), item["labels"]).detach().exp())
    assert task.scored.of(task.scores(model)) == pytest.approx(want, rel=1e-6)


def test_labels_that_are_already_shifted_are_not_shifted_again() -> None:
    ids = batch()["input_ids"]
    item = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
    task = tersor.Task(evaluate=[item], train=[item], feed=feed, metric="perplexity")
    want = F.cross_entropy(net()(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
    assert float(task.loss_of(task.run(net(), item), item).detach()) == pytest.approx(
        float(want.detach()), rel=1e-6
    )
    assert task.scored.of(task.scores(net())) == pytest.approx(float(want.detach().exp()), rel=1e-6)


def test_the_teacher_counts_at_the_last_token_of_a_prompt() -> None:
    """The label there is -100, but its scores predict the first token that counts."""
    item = batch()
    task = tersor.Task(evaluate=[item], feed=feed, loss=lambda output, target: by_hand(output.logits, target))
    student, teacher = net()(item["input_ids"]), Net()(item["input_ids"])
    apart = F.kl_div(student.logits.log_softmax(-1), teacher.logits.log_softmax(-1), log_target=True,
                     reduction="none").sum(-1)  # fmt: skip
    want = apart[item["attention_mask"] == 1].mean()
    assert float(task.soft_loss(student, teacher, item, 1.0).detach()) == pytest.approx(
        float(want.detach()), rel=1e-5
    )


def test_labels_reach_the_model_through_wrappers() -> None:
    assert takes_labels(HandsOn(HandsOn(net())))
    assert takes_labels(torch.compile(net(), backend="eager"))
    assert not takes_labels(Named(net()))
    assert not takes_labels(HandsOn(Named(net())))
