"""tersor demo: the whole pipeline. A short training by default; test-long runs it as users do."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import safetensors.torch
import torch
import yaml
from command_line import Command

import tersor as package
from tersor import demo
from tersor.core.run import run
from tersor.errors import RefusedError
from tersor.io.container_writer import save
from tersor.model.builtin_tasks import digits
from tersor.record.observer import Observer
from tersor.steps import Prune, read_recipe


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The demo's own recipe with a tenth of the training."""
    recipe = yaml.safe_load(demo.RECIPE.read_text())
    for step in recipe["steps"]:
        for settings in step.values() if isinstance(step, dict) else ():
            if "epochs" in settings:
                settings["epochs"] = settings["epochs"] / 10
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr(demo, "RECIPE", tmp_path / "short.yaml")
    monkeypatch.setattr(demo, "EPOCHS", 4)


def test_the_demo_measures_what_it_prints_and_can_be_repeated(
    tersor: Command, short: None, bench: Callable[[str], ModuleType]
) -> None:
    random, threads = torch.get_rng_state(), torch.get_num_threads()
    done = tersor("demo --out d --quiet --json")
    assert done.code == 0
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.get_num_threads() == threads
    facts = done.json
    assert facts == json.loads(Path("d/report.json").read_text())
    files = facts["files"]
    assert files["given"]["nbytes"] == Path("d/given.safetensors").stat().st_size
    assert files["result"]["nbytes"] == Path("d/model.tersor").stat().st_size
    assert files["given"]["nbytes"] > 20 * files["result"]["nbytes"]

    # Both models again, from their files, by torch alone.
    task, slim = digits(), package.load("d/model.tersor").model(demo.net())
    for word, net, path in (
        ("before", demo.net(), "d/given.safetensors"), ("after", slim, "d/unpacked.safetensors")
    ):  # fmt: skip
        net.load_state_dict(safetensors.torch.load_file(path))
        with torch.no_grad():
            hits = [net(x).argmax(1) == y for x, y in task.batches("evaluate")]
        assert facts["accuracy"][word][0] == pytest.approx(float(torch.cat(hits).float().mean()))
    assert package.load("d/model.tersor").digest == facts["result"]
    assert facts["unpacked"]["n"] == 797
    assert len(facts["latency"]["before"]) == 3

    again = tersor("demo --out d")  # the same network, the same recipe, the same seed
    assert again.code == 0
    assert "[1/1] train the network to compress" in again.err
    for text in ("accuracy, %", "file, bytes", "bits a weight", "ONNX Runtime, ms", "2 prune", "skipped",
                 "the same on each of 797 samples"):  # fmt: skip
        assert text in again.out
    second = json.loads(Path("d/report.json").read_text())
    assert second["result"] == package.load("d/model.tersor").digest
    assert [second[key] for key in ("result", "accuracy", "files")] == [
        facts[key] for key in ("result", "accuracy", "files")
    ]
    readme = bench("readme")
    assert readme.printed(Path("d/report.json")) == "".join(
        f"{line.rstrip()}\n" for line in again.out.splitlines()
    )
    for word in ("given", "result"):
        assert f"{files[word]['nbytes']:,}" in again.out
    assert readme.page("a\n```text\nold\n```\nb\n", "new\n") == "a\n```text\nnew\n```\nb\n"
    with pytest.raises(ValueError, match="2 blocks"):
        readme.page("```text\n```\n```text\n```\n", "")
    readme.page(readme.README.read_text(), "")  # has one


@pytest.mark.wide
def test_weights_that_score_differently_would_be_seen(short: None, tmp_path: Path) -> None:
    task = digits()
    given = demo.trained(task, Observer())
    save(given, tmp_path / "model.tersor")
    assert demo.unpacked(tmp_path, given, task)["n"] == 797
    with pytest.raises(RefusedError, match="samples score differently"):
        demo.unpacked(tmp_path, run(given, Prune(keep=0.05)), task)


def test_the_recipe_is_the_documented_one() -> None:
    assert [step.name for step in read_recipe(demo.RECIPE).steps] == [
        "slim", "prune", "cluster", "quantize", "entropy", "measure"
    ]  # fmt: skip
    assert 60_000 <= sum(p.numel() for p in demo.net().parameters()) <= 150_000


@pytest.mark.long
def test_the_demo_as_users_run_it(tersor: Command) -> None:
    facts = tersor("demo --out d -q --json").json
    assert facts["files"]["given"]["nbytes"] > 20 * facts["files"]["result"]["nbytes"]
    assert facts["accuracy"]["p"] > 0.05
    assert facts["accuracy"]["drop"][0] <= 0.5
    assert facts["accuracy"]["before"][0] > 0.975
