"""Metrics: values agree with slow loops and other libraries; drops in pairs, in the metric's unit."""

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

import tersor
from tersor.errors import SettingError, TaskError
from tersor.maths import bootstrap
from tersor.measure.accuracy import compared, drop, estimated, in_words
from tersor.model.builtin_metrics import METRICS, metric_of
from tersor.model.metric import Metric
from tersor.model.task import Task

CLASSES, PLACES = 4, 6


class Same(nn.Module):
    """Returns its input."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def images(samples: int = 7, seed: int = 0, ignored: bool = True) -> tuple[Tensor, Tensor]:
    """Scores [B, K, T] and targets [B, T], the last class in neither, some targets -100."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, CLASSES, PLACES, generator=g)
    x[:, -1] -= 100
    y = torch.randint(CLASSES - 1, (samples, PLACES), generator=g)
    if ignored:
        y[0, :2] = -100
    return x, y


def value(name: str, x: Tensor, y: Tensor) -> float:
    batches = [(x[i : i + 3], y[i : i + 3]) for i in range(0, len(x), 3)]
    task = Task(evaluate=batches, metric=name)
    scores = task.scores(Same())
    assert len(scores) == len(x)
    return task.scored.of(scores)


def pairs(x: Tensor, y: Tensor) -> list[tuple[int, int]]:
    """(predicted, actual) of each position that counts."""
    return [
        (int(x[b, :, t].argmax()), int(y[b, t]))
        for b in range(len(x)) for t in range(PLACES) if int(y[b, t]) != -100
    ]  # fmt: skip


def test_accuracies_are_fractions_of_positions() -> None:
    x, y = images()
    found = pairs(x, y)
    assert value("token_accuracy", x, y) == pytest.approx(sum(a == b for a, b in found) / len(found))
    by_sample = [pairs(x[b : b + 1], y[b : b + 1]) for b in range(len(x))]
    want = sum(sum(a == b for a, b in sample) / len(sample) for sample in by_sample) / len(x)
    assert value("accuracy", x, y) == pytest.approx(want)


def test_overlap_and_f1_of_classes() -> None:
    x, y = images()
    found = pairs(x, y)
    ious, scores = [], []
    for k in range(CLASSES - 1):  # the last class is in neither predictions nor targets
        both = sum(a == b == k for a, b in found)
        said, meant = sum(a == k for a, _ in found), sum(b == k for _, b in found)
        ious.append(both / (said + meant - both))
        precision, recall = both / said if said else 0.0, both / meant
        scores.append(2 * precision * recall / (precision + recall) if both else 0.0)
    assert value("mean_iou", x, y) == pytest.approx(sum(ious) / 3)
    assert value("macro_f1", x, y) == pytest.approx(sum(scores) / 3)
    sklearn = pytest.importorskip("sklearn.metrics")
    said, meant = zip(*found, strict=True)
    assert value("macro_f1", x, y) == pytest.approx(sklearn.f1_score(meant, said, average="macro"))
    assert value("mean_iou", x, y) == pytest.approx(sklearn.jaccard_score(meant, said, average="macro"))


def test_perplexity_of_tokens() -> None:
    x, y = images()
    want = math.exp(float(F.cross_entropy(x, y, ignore_index=-100)))
    assert value("perplexity", x, y) == pytest.approx(want, rel=1e-5)
    assert value("perplexity", x.movedim(1, 2), y) == pytest.approx(want, rel=1e-5), (
        "the class axis of [B, T, V] is found"
    )


def test_correlation() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 1, generator=g)
    y = 2 * x[:, 0] + torch.randn(40, generator=g) + 5
    want = stats.pearsonr(x[:, 0].numpy(), y.numpy()).statistic
    assert value("pearson", x, y) == pytest.approx(want, abs=1e-6)


def test_only_accuracy_refuses_a_sample_without_targets() -> None:
    x, y = images()
    y[3] = -100
    with pytest.raises(TaskError, match="all targets of a sample are -100.*token_accuracy"):
        value("accuracy", x, y)
    assert 0 < value("token_accuracy", x, y) < 1


def test_target_can_replace_another_number_by_the_ignored_one() -> None:
    """For the metric and the distillation loss; for example 255 at borders."""
    x, y = images()
    marked, wanted = y.masked_fill(y == -100, 255), x + torch.randn_like(x)
    with pytest.raises(TaskError, match=r"targets from 0 to 255.*-100 marks targets that do not count"):
        value("mean_iou", x, marked)
    same = Task(evaluate=[(x, y)], metric="mean_iou")
    task = Task(
        evaluate=[(x, marked)],
        metric="mean_iou",
        target=lambda batch: batch[1].masked_fill(batch[1] == 255, -100),
    )
    assert torch.equal(task.scores(Same()), same.scores(Same()))
    assert torch.equal(task.soft_loss(x, wanted, (x, marked), 2.0), same.soft_loss(x, wanted, (x, y), 2.0))
    assert not torch.equal(
        same.soft_loss(x, wanted, (x, marked), 2.0), same.soft_loss(x, wanted, (x, y), 2.0)
    )


# --- in pairs ---


def two(name: str, samples: int = 40) -> tuple[Tensor, Tensor, Metric]:
    """Statistics of a model and of a slightly worse one."""
    x, y = images(samples, ignored=False)
    right = F.one_hot(y, CLASSES).movedim(2, 1).float()
    found = []
    for noise in (x + 2.5 * right, x + 1.7 * right):
        found.append(Task(evaluate=[(noise, y)], metric=name).scores(Same()))
    return found[0], found[1], METRICS[name]


@pytest.mark.parametrize("name", ["token_accuracy", "perplexity", "mean_iou", "macro_f1"])
def test_a_worse_value_is_a_positive_drop_for_higher_and_lower_metrics(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "RESAMPLES", 2000)  # enough for these differences
    before, after, metric = two(name)
    found = compared(before, after, metric)
    was, now = metric.of(before), metric.of(after)
    assert found["before"][0] == pytest.approx(was)
    assert found["before"][1] < was < found["before"][2]
    amount = (100 if metric.percent else 1) * metric.sign * (was - now)
    assert found["drop"][0] == pytest.approx(amount)
    assert amount > 0
    assert found["drop"][1] < amount < found["drop"][2]
    assert found["p"] < 0.01
    assert found["n"] == 40
    assert found["unit"] == ("points" if metric.percent else "")
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert drop(before, after, metric).significant
    assert not drop(after, before, metric).significant, "a gain is not a drop"
    assert drop(before, before, metric).p == 1.0
    assert compared(before, after, metric) == found, "a second call gives the same"
    assert estimated(before, metric).low == pytest.approx(found["before"][1])


def test_paired_intervals_are_narrower() -> None:
    before, after, metric = two("token_accuracy")
    shuffled = after[torch.randperm(len(after), generator=torch.Generator().manual_seed(0))]
    width = lambda other: drop(before, other, metric).high - drop(before, other, metric).low  # noqa: E731
    assert width(after) < 0.9 * width(shuffled)


def test_one_number_a_sample_with_lower_better() -> None:
    metric = Metric("error", statistics=lambda out, y: (out[:, 0] - y).abs(), better="lower")
    found = compared([1.0, 2.0, 3.0], [1.5, 2.5, 4.0], metric)
    assert found["drop"][0] == pytest.approx(2 / 3)
    assert found["drop"][1] < 2 / 3 < found["drop"][2]
    assert in_words(found) == "error 2.0000 to 2.6667, lower is better, drop +0.6667"


def test_one_sample_has_no_interval() -> None:
    before, after, metric = two("perplexity", 1)
    found = compared(before, after, metric)
    assert found["drop"][1:] == [None, None]
    assert found["p"] == 1


def test_different_numbers_of_samples_are_refused() -> None:
    before, after, metric = two("perplexity")
    with pytest.raises(SettingError, match="40 samples before, 39 after"):
        compared(before, after[1:], metric)


def median_of(better: str = "higher", resamples: int | None = None) -> Metric:
    """The median of all numbers, which is not a function of sums."""
    return Metric(
        "median", statistics=lambda out, y: list(out.abs()), better=better, resamples=resamples,
        value=lambda found: float(torch.cat(found).median()),
    )  # fmt: skip


def test_a_metric_of_a_list_of_objects() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 5, generator=g), torch.zeros(30)
    task = Task(evaluate=[(x[:20], y[:20]), (x[20:], y[20:])], metric=median_of(resamples=50))
    scores = task.scores(Same())
    assert len(scores) == 30
    assert task.scored.of(scores) == float(x.abs().median())
    result = tersor.run(Same(), [tersor.Measure()], task)
    (note,) = result.ledger.notes("accuracy")
    assert note.data["metric"] == "median"
    assert note.data["before"][0] == float(x.abs().median())
    assert note.text.startswith("median ")
    assert "points" not in note.text


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "misspelt": (lambda: metric_of("perplexty", "task"), "did you mean 'perplexity'"),
    "better": (lambda: Metric("m", statistics=len, better="more"), "better='more'"),
    "statistics": (lambda: Metric("m", statistics=3), r"statistics\(output, target\)"),  # type: ignore[arg-type]
    "value": (lambda: Metric("m", statistics=len, value=3), r"value\(sums"),  # type: ignore[arg-type]
    "kind": (lambda: Metric("m", statistics=len, kind="class"), "did you mean 'classes'"),
    "name": (lambda: Metric("", statistics=len), "name=''"),
    "resamples": (lambda: Metric("m", statistics=len, resamples=0), "resamples=0"),
    "flat statistics": (
        lambda: value_of(Metric("m", statistics=lambda out, y: out[:, 0], value=len)),
        r"statistics of each sample, \[4, S\]",
    ),
    "short list": (
        lambda: value_of(Metric("m", statistics=lambda out, y: [1], value=len)),
        "one object a sample, 4",
    ),
    "statistics that are not finite": (
        lambda: value_of(Metric("m", statistics=lambda out, y: out / 0, value=len)),
        "not finite",
    ),
    "a set's number without value": (
        lambda: value_of(Metric("m", statistics=lambda out, y: out.mean())),
        r"tersor\.Metric\(statistics=, value=\)",
    ),
    "a value that is not a number": (
        lambda: value_of(Metric("m", statistics=lambda out, y: out, value=lambda sums: sums)),
        "its value is .*, but must be one number",
    ),
    "a value that is NaN": (
        lambda: compared(torch.ones(3, 6), torch.ones(3, 6), METRICS["pearson"]),
        "its value on the evaluation set is nan",
    ),
    "two heads": (
        lambda: Task(
            evaluate=[(torch.ones(4, 3), torch.zeros(4).long())],
            logits=lambda out: (tersor.Logits(out, "classes"), tersor.Logits(out, "regression")),
        ).scores(Same()),
        "accuracy is for classes, but logits= returns classes and regression",
    ),
}  # fmt: skip


def value_of(metric: Metric) -> float:
    task = Task(evaluate=[(torch.ones(4, 3), torch.zeros(4))], metric=metric)
    return metric.of(task.scores(Same()))


@pytest.mark.parametrize(("call", "words"), WRONG.values(), ids=list(WRONG))
def test_wrong_metrics_are_refused(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(TaskError, match=words):
        call()


# --- a drop in the metric's unit, in recipes ---


@pytest.mark.wide
def test_rdoq_with_a_perplexity() -> None:
    """rdoq's max_drop is in the metric's unit; a rise of the perplexity is a drop."""
    g = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, CLASSES))
    x = torch.randn(200, 8, generator=g)
    y = x[:, :CLASSES].argmax(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    task = Task(evaluate=[(x, y)], calibrate=[(x[:50],)], train=[(x, y)], metric="perplexity")
    result = tersor.run(model, [tersor.Rdoq(max_drop=0.05), tersor.Measure()], task)
    (note,) = result.ledger.notes("decided")
    assert 0.03 < note.data["found"]["drop"][2] <= 0.05, "the end of a bootstrap interval is near the limit"
    with torch.no_grad():
        was, now = (float(F.cross_entropy(net(x), y).exp()) for net in (model, result.model()))
    (note,) = result.ledger.notes("accuracy")
    assert note.data["drop"][0] == pytest.approx(now - was, abs=1e-4)
    assert 0.01 < now - was <= 0.05
    assert note.data["better"] == "lower"


# --- torchmetrics ---


@pytest.mark.extra
def test_an_object_of_torchmetrics() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    x, y = images(12, ignored=False)
    metric = torchmetrics.classification.MulticlassJaccardIndex(num_classes=CLASSES)
    batches = [(x[:5], y[:5]), (x[5:], y[5:])]
    task = Task(evaluate=batches, metric=metric)
    assert task.scored.of(task.scores(Same())) == pytest.approx(float(metric(x, y)))
    found = compared(task.scores(Same()), task.scores(Same()), task.scored)
    assert found["metric"] == "MulticlassJaccardIndex"
    assert found["drop"][0] == 0
    error = torchmetrics.MeanSquaredError()
    lower = Task(evaluate=[(torch.zeros(5), torch.ones(5))], metric=error)
    assert lower.scored.better == "lower"
    assert lower.scored.of(lower.scores(Same())) == 1
    assert error.total == 0, "the given object is not changed"
    with pytest.raises(TaskError, match="does not say whether higher is better"):
        Task(evaluate=batches, metric=torchmetrics.CatMetric())
    several = torchmetrics.MetricCollection([torchmetrics.R2Score(), torchmetrics.MeanSquaredError()])
    with pytest.raises(TaskError, match="Give one of R2Score, MeanSquaredError"):
        Task(evaluate=batches, metric=several)


@pytest.mark.extra
def test_mean_average_precision_of_lists_of_detections() -> None:
    detection = pytest.importorskip("torchmetrics.detection")
    pytest.importorskip("pycocotools")
    metric = detection.MeanAveragePrecision()
    g = torch.Generator().manual_seed(0)
    corners = 20 * torch.rand(6, 2, generator=g)
    boxes = torch.cat([corners, corners + 10], 1)
    targets = [{"boxes": box[None], "labels": torch.zeros(1).long()} for box in boxes]

    class Finds(nn.Module):
        def __init__(self, off: float) -> None:
            super().__init__()
            self.off = nn.Parameter(torch.tensor(off))

        def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
            return [
                {"boxes": b[None] + self.off, "scores": torch.ones(1), "labels": torch.zeros(1).long()}
                for b in x
            ]

    task = Task(evaluate=[(boxes[:4], targets[:4]), (boxes[4:], targets[4:])], metric=metric)
    before, after = (task.scores(Finds(off)) for off in (0.0, 2.0))
    want = detection.MeanAveragePrecision()
    with torch.no_grad():
        want.update(Finds(2.0)(boxes), targets)
    assert task.scored.of(before) == pytest.approx(1.0)
    assert task.scored.of(after) == pytest.approx(float(want.compute()["map"]))
    quick = Metric("map", statistics=task.scored.statistics, value=task.scored.value, resamples=20)
    assert compared(before, after, quick)["p"] < 0.1


class Adds(nn.Module):
    """A metric like those of torchmetrics: the fraction of right positions over all updates."""

    higher_is_better = True

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        self.right = self.all = 0

    def update(self, output: Tensor, target: Tensor) -> None:
        self.right += int((output.argmax(1) == target).sum())
        self.all += target.numel()

    def compute(self) -> Tensor:
        return torch.tensor(self.right / self.all)


def test_batches_of_other_lengths_are_counted_together() -> None:
    """Batches of texts are padded to different lengths."""
    x, y = images(ignored=False)
    batches = [(x[:3], y[:3]), (x[3:5, :, :4], y[3:5, :4]), (x[5:], y[5:])]
    task = Task(evaluate=batches, metric=Adds())
    hits = [int(a[:, t].argmax()) == int(b[t]) for one in batches for a, b in zip(*one, strict=True)
            for t in range(len(b))]  # fmt: skip
    assert task.scored.of(task.scores(Same())) == pytest.approx(sum(hits) / len(hits))
