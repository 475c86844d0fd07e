"""Models whose output is not a single tensor train, distill and are measured: from libraries and users.

Losses are compared with the model's own, computed by hand; weights must move and the loss must fall.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tersor
from tersor.errors import TaskError
from tersor.model.needs import Needs
from tersor.model.task import Task

VOCABULARY, LENGTH = 23, 7


def seeded(make: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def moved(result: tersor.State, model: nn.Module) -> bool:
    given = model.state_dict()
    return any(not torch.equal(value, given[name]) for name, value in result.state_dict().items())


def mean_loss(model: nn.Module, batches: list[dict[str, Tensor]]) -> float:
    """The model's own loss."""
    model.eval()
    with torch.no_grad():
        return sum(float(model(**batch).loss) for batch in batches) / len(batches)


# --- Hugging Face ---


def tokens(masked: bool = False, count: int = 3) -> list[dict[str, Tensor]]:
    """Batches of rising tokens, the last two of the second sample padding."""
    g, found = torch.Generator().manual_seed(1), []
    for _ in range(count):
        x = (torch.randint(VOCABULARY, (4, 1), generator=g) + torch.arange(LENGTH)) % VOCABULARY
        mask = torch.ones_like(x)
        mask[1, -2:] = 0
        labels = x.masked_fill(mask == 0, -100)
        if masked:
            hidden = torch.rand(x.shape, generator=g) < 0.3
            hidden[:, 0] = True
            labels = labels.masked_fill(~hidden, -100)
            x = x.masked_fill(hidden, 0)
        found.append({"input_ids": x, "attention_mask": mask, "labels": labels})
    return found


def bert(t: Any) -> tuple[nn.Module, list[Any]]:
    config = t.BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=16, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return t.BertForMaskedLM(config), tokens(masked=True)


def gpt2(t: Any) -> tuple[nn.Module, list[Any]]:
    config = t.GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=16, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return t.GPT2LMHeadModel(config), tokens()


def llama(t: Any) -> tuple[nn.Module, list[Any]]:
    config = t.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=24, max_position_embeddings=16,
    )  # fmt: skip
    return t.LlamaForCausalLM(config), tokens()


def t5(t: Any) -> tuple[nn.Module, list[Any]]:
    config = t.T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return t.T5ForConditionalGeneration(config), tokens()


def whisper(t: Any) -> tuple[nn.Module, list[Any]]:
    config = t.WhisperConfig(
        vocab_size=VOCABULARY, num_mel_bins=8, d_model=16, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
        max_source_positions=10, max_target_positions=12, dropout=0.0, decoder_start_token_id=0,
        pad_token_id=0, bos_token_id=0, eos_token_id=1, begin_suppress_tokens=None,
    )  # fmt: skip
    g = torch.Generator().manual_seed(2)
    heard = [
        {"input_features": torch.randn(4, 8, 20, generator=g), "labels": batch["labels"]}
        for batch in tokens()
    ]
    return t.WhisperForConditionalGeneration(config), heard


MODELS = {"bert": bert, "gpt2": gpt2, "llama": llama, "t5": t5, "whisper": whisper}


@pytest.fixture(scope="module", params=list(MODELS))
def language(request: pytest.FixtureRequest) -> tuple[str, nn.Module, list[Any], Task]:
    transformers = pytest.importorskip("transformers")
    model, batches = seeded(lambda: MODELS[request.param](transformers))
    return request.param, model.eval(), batches, Task("language", evaluate=batches, train=batches)


@pytest.mark.extra
def test_the_loss_is_the_models_own(language: Any) -> None:
    _, model, batches, task = language
    for batch in batches:
        with torch.no_grad():
            found = task.loss_of(task.run(model, batch), batch)
            assert torch.equal(found, model(**batch).loss)


@pytest.mark.extra
def test_language_models_train_and_distill(language: Any) -> None:
    _, model, batches, task = language
    steps = [
        tersor.Prune(keep=0.5),
        tersor.Distill(epochs=1, lr=0.01),
        tersor.Quantize(),
        tersor.Entropy(),
    ]
    cut = tersor.run(model, steps[0], task)
    small = tersor.run(model, steps, task)
    assert moved(small, cut.model())
    assert mean_loss(small.model(), batches) < mean_loss(cut.model(), batches)


@pytest.mark.extra
def test_fine_tuning_lowers_the_loss(language: Any) -> None:
    _, model, batches, task = language
    tuned = tersor.run(model, tersor.Finetune(epochs=6, lr=0.01), task)
    assert mean_loss(tuned.model(), batches) < 0.9 * mean_loss(model, batches)


@pytest.mark.extra
def test_a_student_of_tokens_comes_nearer_to_its_teacher(language: Any) -> None:
    """teacher_weight=1: only soft targets over the vocabulary. A softmax over the tokens would not train."""
    _, model, batches, task = language

    def apart(other: nn.Module) -> float:
        total = 0.0
        for batch in batches:
            with torch.no_grad():
                mine, theirs = (net(**batch).logits.log_softmax(-1) for net in (other, model))
            total += float((theirs.exp() * (theirs - mine)).sum(-1).mean())
        return total

    cut = tersor.run(model, tersor.Prune(keep=0.3), task)
    taught = tersor.run(cut, tersor.Distill(epochs=8, teacher_weight=1.0, lr=0.003), task)
    assert apart(taught.model()) < 0.8 * apart(cut.model())


@pytest.mark.extra
def test_perplexity_is_that_of_the_models_own_loss(language: Any) -> None:
    name, model, batches, _ = language
    task = Task("one batch", evaluate=batches[:1], metric="perplexity")
    with torch.no_grad():
        want = float(model(**batches[0]).loss.double().exp())
    assert task.scored.of(task.scores(model)) == pytest.approx(want, rel=1e-4), name


@pytest.mark.extra
def test_a_decoder_without_labels_wants_its_inputs() -> None:
    transformers = pytest.importorskip("transformers")
    model, batches = seeded(lambda: t5(transformers))
    bare = [{key: batch[key] for key in ("input_ids", "attention_mask")} for batch in batches]
    whole = [
        {**few, "decoder_input_ids": batch["input_ids"]} for few, batch in zip(bare, batches, strict=True)
    ]
    step = tersor.Distill(epochs=1, teacher_weight=1.0, lr=0.01)
    result = tersor.run(model, [tersor.Prune(keep=0.5), step], Task("t", evaluate=whole, train=whole))
    assert moved(result, tersor.run(model, tersor.Prune(keep=0.5)).model())
    with pytest.raises(TaskError, match="decoder_input_ids"):
        tersor.run(model, step, Task("t", evaluate=bare, train=bare))


# --- torchvision ---


@pytest.mark.extra
def test_a_detector_trains_with_its_own_losses() -> None:
    """A dict of losses in training, a list of dicts in evaluation; a metric of lists of detections."""
    torchvision = pytest.importorskip("torchvision")
    make = torchvision.models.detection.ssdlite320_mobilenet_v3_large
    model = seeded(lambda: make(weights=None, weights_backbone=None, num_classes=3)).eval()
    g = torch.Generator().manual_seed(0)
    targets = [
        {"boxes": torch.tensor([[4.0, 4.0, 40.0, 44.0]]), "labels": torch.tensor([1 + k])} for k in range(2)
    ]
    batch = ([torch.rand(3, 64, 64, generator=g) for _ in range(2)], targets)

    def feed(net: nn.Module, batch: Any) -> Any:
        return net(batch[0], batch[1]) if net.training else net(batch[0])

    def found(output: Any, target: Any) -> Tensor:
        return torch.tensor([float(len(item["boxes"])) for item in output])

    task = Task(
        "detection", evaluate=[batch], train=[batch], feed=feed, loss=lambda out, _: sum(out.values()),
        metric=found,
    )  # fmt: skip
    before = {name: value.clone() for name, value in model.state_dict().items()}
    task.check(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        by_hand = sum(float(loss) for loss in copy.deepcopy(model).train()(*batch).values())
    trained = tersor.run(model, tersor.Finetune(epochs=3, lr=1e-3, schedule="constant"), task)
    with torch.no_grad():
        after = sum(float(loss) for loss in trained.model().train()(*batch).values())
    assert after < by_hand
    assert moved(trained, model)
    with pytest.raises(TaskError, match="logits="):  # losses cannot be compared with a teacher's outputs
        tersor.run(model, tersor.Distill(epochs=1), task)


# --- a user's own models ---


class Cascade(nn.Module):
    """MTCNN's three outputs: face or not, a box, five landmarks (Zhang 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 12), nn.PReLU(12))
        self.face, self.box, self.landmarks = nn.Linear(12, 2), nn.Linear(12, 4), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.body(x)
        return self.face(h), self.box(h), self.landmarks(h)


def cascade_loss(output: Any, target: Any) -> Tensor:
    (face, box, landmarks), (is_face, at, points) = output, target
    return F.cross_entropy(face, is_face) + 0.5 * F.mse_loss(box, at) + 0.5 * F.mse_loss(landmarks, points)


def cascade() -> tuple[nn.Module, list[Any]]:
    g = torch.Generator().manual_seed(3)
    x = [torch.randn(8, 6, generator=g) for _ in range(3)]
    return Cascade().eval(), [(a, ((a[:, 0] > 0).long(), a[:, 1:5], a.repeat(1, 2)[:, :10])) for a in x]


def test_a_tuple_of_outputs_trains_with_the_tasks_own_loss() -> None:
    model, batches = seeded(cascade)
    right = lambda output, target: (output[0].argmax(1) == target[0]).float()  # noqa: E731
    task = Task("faces", evaluate=batches, train=batches, loss=cascade_loss, metric=right)

    def by_hand(net: nn.Module) -> float:
        with torch.no_grad():
            return sum(float(cascade_loss(net(x), y)) for x, y in batches)

    trained = tersor.run(model, tersor.Finetune(epochs=5, lr=0.02), task)
    assert by_hand(trained.model()) < 0.8 * by_hand(model)
    with pytest.raises(TaskError, match=r"it is ambiguous which tensor to compare.*logits=lambda output"):
        tersor.run(model, tersor.Distill(epochs=1), task)
    result = tersor.run(model, [tersor.Prune(keep=0.3), tersor.Measure()], task)
    (note,) = result.ledger.notes("accuracy")
    assert note.data["n"] == 24


def test_what_the_last_step_cannot_work_with_is_refused_before_anything_trains() -> None:
    model, batches = seeded(cascade)
    calls: list[Any] = []

    def loss(output: Any, target: Any) -> Tensor:
        calls.append(output)
        return cascade_loss(output, target)

    task = Task("faces", evaluate=batches, train=batches, loss=loss, metric=never)
    for last, words in (
        (tersor.Distill(epochs=1), "it is ambiguous which tensor to compare"),
        (tersor.Measure(), "nobody asked"),
    ):
        calls.clear()
        with pytest.raises(TaskError, match=words):
            tersor.run(model, [tersor.Finetune(epochs=1), last], task)
        assert len(calls) <= 1, "the trial's own"


def test_several_heads_distill() -> None:
    from dataclasses import replace

    model, batches = seeded(cascade)

    def heads(output: Any) -> Any:
        return tersor.Logits(output[0], "classes"), *(
            tersor.Logits(part, "regression") for part in output[1:]
        )

    task = Task("faces", evaluate=batches, train=batches, loss=cascade_loss, logits=heads)
    cut = tersor.run(model, tersor.Prune(keep=0.3))

    def answers(net: nn.Module, k: int) -> Tensor:
        with torch.no_grad():
            found = torch.cat([net(x)[k] for x, _ in batches])
        return found.softmax(1) if k == 0 else found

    def apart(net: nn.Module) -> list[float]:
        return [float((answers(net, k) - answers(model, k)).square().mean()) for k in range(3)]

    taught = tersor.run(cut, tersor.Distill(epochs=20, teacher_weight=1.0, lr=0.02, temperature=1.0), task)
    for mine, was in zip(apart(taught.model()), apart(cut.model()), strict=True):
        assert mine < 0.7 * was
    # The default loss of several logits: the sum of one loss for each target.
    plain = replace(task, loss=tersor.Task(evaluate=[0]).loss)
    x, (face, box, landmarks) = batches[0]
    with torch.no_grad():
        a, b, c = model(x)
        want = F.cross_entropy(a, face) + F.mse_loss(b, box) + F.mse_loss(c, landmarks)
        torch.testing.assert_close(plain.loss_of(model(x), batches[0]), want)


class Auxiliary(nn.Module):
    """Two outputs in training, one in evaluation, like Inception and GoogLeNet."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.second = nn.Linear(6, 12), nn.Linear(12, 3), nn.Linear(12, 3)
        self.norm = nn.BatchNorm1d(12)

    def forward(self, x: Tensor) -> Any:
        h = self.norm(self.body(x)).relu()
        return {"main": self.head(h), "second": self.second(h)} if self.training else self.head(h)


def test_outputs_that_differ_between_training_and_evaluation() -> None:
    model = seeded(Auxiliary)
    g = torch.Generator().manual_seed(4)
    batches = [(x, x[:, :3].argmax(1)) for x in torch.randn(3, 8, 6, generator=g)]
    loss = lambda out, y: F.cross_entropy(out["main"], y) + 0.3 * F.cross_entropy(out["second"], y)  # noqa: E731
    main = lambda output: output["main"] if isinstance(output, dict) else output  # noqa: E731
    task = Task("two", evaluate=batches, train=batches, loss=loss, logits=main)
    result = tersor.run(
        model, [tersor.Prune(keep=0.5), tersor.Distill(epochs=4, lr=0.02), tersor.Measure()], task
    )
    assert moved(result, model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    task.check(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    with pytest.raises(TaskError, match="logits= does not fit"):  # a teacher runs in eval mode
        Task("t", evaluate=batches, train=batches, logits=lambda output: output.get("main")).check(
            model, Needs.SOFT
        )


def test_bfloat16_parts_are_cast_in_their_containers() -> None:
    model, batches = seeded(cascade)
    seen: list[Any] = []

    def loss(output: Any, target: Any) -> Tensor:
        seen.append(output)
        return cascade_loss(output, target)

    task = Task("faces", evaluate=batches, train=batches, loss=loss)
    tersor.run(model, tersor.Finetune(epochs=1, bf16=True), task)
    assert seen
    assert all(
        type(output) is tuple and {part.dtype for part in output} == {torch.float32} for output in seen
    )


# --- what steps need, and what they do not ---


def never(*_: Any) -> Any:
    raise AssertionError("nobody asked for it")


def test_steps_without_a_loss_do_not_require_one() -> None:
    model = seeded(lambda: nn.Linear(4, 3))
    batches = [(torch.randn(5, 4), torch.zeros(5, dtype=torch.int64))]
    task = Task("scored", evaluate=batches, train=batches, loss=never)
    tersor.run(model, [tersor.Prune(), tersor.Quantize(), tersor.Entropy(), tersor.Measure()], task)
    bare = Task("bare", evaluate=batches, train=batches, loss=never, metric=never)
    tersor.run(model, [tersor.Prune(), tersor.Entropy()], bare)
    with pytest.raises(TaskError, match="nobody asked"):
        tersor.run(model, tersor.Measure(), bare)
    with pytest.raises(TaskError, match="nobody asked"):
        tersor.run(model, tersor.Finetune(), task)


def test_a_teacher_alone_needs_no_targets() -> None:
    model = seeded(lambda: nn.Linear(4, 3))
    x = [(torch.randn(5, 4),)]
    task = Task("bare", evaluate=x, train=x, loss=never, metric=never, logits="classes", target=never)
    step = tersor.Distill(epochs=1, teacher_weight=1.0, lr=0.1)
    assert moved(tersor.run(model, [tersor.Quantize(bits=2), step], task), model)


def test_a_loss_is_tried_in_training_mode_before_anything_starts() -> None:
    """The loss fits only the output in eval mode, which is an error before the first step."""
    model = seeded(Auxiliary)
    batches = [(torch.randn(5, 6), torch.zeros(5, dtype=torch.int64))]
    task = Task("two", evaluate=batches, train=batches, loss=F.cross_entropy)
    started: list[str] = []

    class Watch(tersor.Observer):
        def step(self, number: int, total: int, name: str) -> None:
            started.append(name)

    with pytest.raises(TaskError, match="the loss does not fit.*main"):
        tersor.run(model, [tersor.Prune(), tersor.Finetune()], task, observer=Watch())
    assert not started
