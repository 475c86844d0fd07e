"""tersor run: the folder it writes, where weights come from, resuming; words, files and Python agree."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml
from command_line import SITES, Command
from torch import nn

import tersor as package
from tersor.errors import RefusedError, SettingError
from tersor.resolve import resolve_model

WORDS = "prune keep=0.3 cluster entries=4 entropy"
YAML = "tersor: 1\nseed: 0\nsteps: [prune: {keep: 0.3}, cluster: {entries: 4}, entropy]\n"
RUN = "run mine.py:net --task mine.py:task -q --json --out"


def test_run_writes_its_folder(tersor: Command) -> None:
    done = tersor(f"{RUN} o {WORDS}")
    assert done.code == 0
    assert sorted(path.name for path in Path("o").iterdir()) == [
        "model.tersor", "recipe.lock.yaml", "report.json"
    ]  # fmt: skip
    facts = done.json
    assert facts == json.loads(Path("o/report.json").read_text())
    assert facts["files"]["result"]["nbytes"] == Path("o/model.tersor").stat().st_size
    assert list(facts["sites"]) == SITES
    assert "latency" not in facts  # not measured, so absent


def test_the_facts_agree_with_the_file_and_the_model(tersor: Command) -> None:
    facts = tersor(f"{RUN} o {WORDS}").json
    result = package.load("o/model.tersor")
    given = resolve_model("mine.py:net")
    assert facts["result"] == result.digest
    assert facts["bits"]["stored"] == 8 * result.nbytes
    assert facts["bits"]["weights"] == sum(p.numel() for p in given.model().parameters())
    scores = given_task().scores(result.model(given.given))
    assert facts["accuracy"]["after"][0] == pytest.approx(float(scores.mean()))
    plain = safetensors.torch.save(given.model().state_dict())
    assert facts["files"]["given"]["nbytes"] == len(plain)
    zeros = float((result.state_dict()["0.weight"] == 0).float().mean())
    assert facts["steps"][0]["sites"]["0.weight"]["data"]["kept"] == round((1 - zeros) * 6 * 48)


def given_task() -> package.Task:
    from tersor.model.builtin_tasks import task_from

    return task_from("mine.py:task")


def test_words_yaml_and_python_have_one_ledger(tersor: Command) -> None:
    Path("recipe.yaml").write_text(YAML)
    words = tersor(f"{RUN} o1 {WORDS}").json
    file = tersor(f"{RUN} o2 --recipe recipe.yaml").json
    steps = [package.Prune(keep=0.3), package.Cluster(entries=4), package.Entropy()]
    python = package.run(resolve_model("mine.py:net"), steps, given_task())
    assert words["ledger"] == file["ledger"] == python.ledger.digest
    assert Path("o1/recipe.lock.yaml").read_text() == Path("o2/recipe.lock.yaml").read_text()


def test_the_lock_is_a_recipe_and_holds_the_run_to_its_result(tersor: Command) -> None:
    first = tersor(f"{RUN} o1 {WORDS}").json
    again = tersor(f"{RUN} o2 --recipe o1/recipe.lock.yaml").json
    assert again["result"] == first["result"]
    lock = yaml.safe_load(Path("o1/recipe.lock.yaml").read_text())
    lock["result"]["0.weight"] = "0" * 16
    Path("other.yaml").write_text(yaml.safe_dump(lock))
    done = tersor(f"{RUN} o3 --recipe other.yaml")
    assert done.code == 1
    assert "the lock says 0000000000000000" in done.json["error"]


def test_a_finished_run_is_not_overwritten(tersor: Command) -> None:
    first = tersor(f"{RUN} o {WORDS}")
    before = Path("o/model.tersor").read_bytes()
    for words in ("", "--resume "):
        done = tersor(f"{RUN} o {words}{WORDS}")
        assert done.code == 1
        assert "o holds a finished run" in done.json["error"]
        assert "--force" in done.json["error"]
    again = tersor(f"{RUN} o --force {WORDS}")
    assert again.code == 0
    assert again.json["result"] == first.json["result"]
    assert Path("o/model.tersor").read_bytes() == before


@pytest.mark.wide
def test_the_same_run_gives_the_same_file(tersor: Command) -> None:
    """Byte for byte; seconds are in the report."""
    for folder in ("o1", "o2"):
        tersor(f"{RUN} {folder} {WORDS} finetune epochs=2 measure latency=true")
    assert Path("o1/model.tersor").read_bytes() == Path("o2/model.tersor").read_bytes()
    assert all("seconds" in step for step in json.loads(Path("o1/report.json").read_text())["steps"])
    assert "latency" in json.loads(Path("o1/report.json").read_text())


def test_a_journal_is_not_overwritten_and_resume_reports_again(tersor: Command) -> None:
    first = tersor(f"{RUN} o --keep-journal {WORDS}")
    before = Path("o/model.tersor").read_bytes()
    done = tersor(f"{RUN} o {WORDS}")
    assert done.code == 1
    assert "--resume" in done.json["error"]
    again = tersor(f"{RUN} o --resume {WORDS}")
    assert again.code == 0
    assert not Path("o/journal").exists()
    assert again.json["result"] == first.json["result"]
    assert again.json["ledger"] == first.json["ledger"]
    assert Path("o/model.tersor").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ("prune keep=0.2 entropy", "recipe"),
        (f"--seed 7 {WORDS}", "recipe"),
        ("--weights w.pt " + WORDS, "model"),
    ],
)
def test_resume_refuses_what_changed(tersor: Command, change: str, what: str) -> None:
    tersor(f"{RUN} o --keep-journal {WORDS}")
    torch.save({k: v + 1 for k, v in resolve_model("mine.py:net").state_dict().items()}, "w.pt")
    done = tersor(f"{RUN} o --resume {change}")
    assert done.code == 1
    assert f"the {what} changed" in done.json["error"]


def test_a_refused_run_leaves_the_folder_usable(tersor: Command) -> None:
    assert tersor(f"{RUN} o prune keep=0.5 finetune where=nothing").code == 2
    assert tersor("run mine.py:net -q --out o finetune").code == 1  # no task
    assert tersor(f"{RUN} o {WORDS}").code == 0


def test_seed_replaces_the_recipes_own(tersor: Command) -> None:
    Path("recipe.yaml").write_text(YAML)
    assert tersor(f"{RUN} o --recipe recipe.yaml --seed 3").json["recipe"]["seed"] == 3


def test_export_writes_and_compares(tersor: Command) -> None:
    facts = tersor(f"{RUN} o --export prune keep=0.5").json
    assert facts["export"]["nbytes"] == Path("o/model.onnx").stat().st_size
    assert facts["export"]["agree"] == 1
    assert facts == json.loads(Path("o/report.json").read_text())
    assert facts["ledger"] == tersor(f"{RUN} o2 prune keep=0.5").json["ledger"]
    assert (
        "exported: model.onnx" in tersor("run mine.py:net --task mine.py:task -q --out o3 --export prune").out
    )
    told = tersor("run mine.py:net --task mine.py:task -q --out o4 prune export").out
    assert "written to o4: model.tersor, model.onnx, recipe.lock.yaml" in told


def test_a_model_that_cannot_be_exported_is_still_compressed(tersor: Command) -> None:
    text = Path("mine.py").read_text()
    Path("mine.py").write_text(text.replace("def data(", BRANCH + "def data("))
    done = tersor(f"{RUN.replace(':net', ':branching')} o --export prune keep=0.5")
    assert done.code == 1
    assert "cannot be exported" in done.json["error"]
    assert package.load("o/model.tersor").digest == json.loads(Path("o/report.json").read_text())["result"]
    assert tersor("run mine.py:net -q --out o4 --export prune").code == 2  # no task


@pytest.mark.parametrize(
    ("words", "why"),
    [("export measure", "cannot be exported"), ("measure export dynamic_axes=7", "no input has an axis 7")],
)
def test_a_refused_last_step_loses_no_training(words: str, why: str, tersor: Command) -> None:
    """A wrong dynamic_axes lost all that had been trained: a resume wants the same recipe."""
    text = Path("mine.py").read_text()
    Path("mine.py").write_text(text.replace("def data(", BRANCH + "def data("))
    run = RUN.replace(":net", ":branching")
    done = tersor(f"{run} o prune keep=0.5 epochs=1 {words}")
    assert done.code == 1
    assert why in done.json["error"]
    assert "The network is written: o/model.tersor" in done.json["error"]
    kept = package.load("o/model.tersor")
    assert kept.digest == json.loads(Path("o/report.json").read_text())["result"]
    assert kept.digest == tersor(f"{run} o2 prune keep=0.5 epochs=1").json["result"]
    assert tersor(f"{run} o3 prune keep=0.5 export prune keep=0.2").code == 1
    assert not Path("o3/model.tersor").exists()  # the network is not what was asked for


BRANCH = """
class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()
    def forward(self, x):
        return self.net(x) if x.sum().item() > 0 else self.net(x) * 2

def branching():
    return Branching()

"""


def test_what_a_users_file_prints_stays_out_of_the_document(tersor: Command) -> None:
    Path("mine.py").write_text(
        Path("mine.py").read_text().replace("def task():", "def task():\n    print('hello')")
    )
    done = tersor(f"{RUN} o prune")
    assert done.json["task"] == "thirds"
    assert done.err == "hello\n"


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_weights_come_from_a_file(tersor: Command, suffix: str) -> None:
    weights = {name: value + 0.5 for name, value in resolve_model("mine.py:net").state_dict().items()}
    save = safetensors.torch.save_file if suffix == "safetensors" else torch.save
    save(weights, f"w.{suffix}")
    facts = tersor(f"{RUN} o --weights w.{suffix} entropy").json
    assert facts["base"] != tersor(f"{RUN} o2 entropy").json["base"]
    found = package.load("o/model.tersor").state_dict()
    assert all(torch.equal(found[name], value) for name, value in weights.items())


def test_a_compressed_model_continues_from_its_forms(tersor: Command) -> None:
    first = tersor(f"{RUN} o1 prune keep=0.4").json
    second = tersor(
        "run o1/model.tersor --arch mine.py:net --task mine.py:task -q --json --out o2 entropy"
    ).json
    assert second["base"] == first["base"]
    assert second["sites"]["0.weight"]["form"].startswith("Masked(")
    whole = tersor(f"{RUN} o3 prune keep=0.4 entropy").json
    for key in ("result", "ledger", "accuracy"):
        assert second[key] == whole[key]


def test_the_drop_is_unknown_without_the_first_weights(tersor: Command) -> None:
    """Not +0.00: the weights in the code are not the first weights of the file, unless they are given."""
    first = {name: value + 0.5 for name, value in resolve_model("mine.py:net").state_dict().items()}
    safetensors.torch.save_file(first, "w.safetensors")
    tersor(f"{RUN} o1 --weights w.safetensors prune keep=0.1")
    go_on = "run o1/model.tersor --arch mine.py:net --task mine.py:task -q --json --out"
    unknown = tersor(f"{go_on} o2 measure").json
    assert "accuracy" not in unknown
    assert "the drop is unknown" in unknown["steps"][-1]["notes"][-1]["text"]
    known = tersor(f"{go_on} o3 --base w.safetensors measure").json
    assert known["accuracy"] == tersor(f"{RUN} o4 --weights w.safetensors prune keep=0.1").json["accuracy"]
    safetensors.torch.save_file({k: v + 1 for k, v in first.items()}, "other.safetensors")
    done = tersor(f"{go_on} o5 --base other.safetensors measure")
    assert done.code == 1
    assert "does not hold the weights that o1/model.tersor was made from" in done.json["error"]
    assert tersor(f"{go_on} o6 distill").code == 1  # its teacher would be the first model


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight


@pytest.mark.parametrize("kept", ["a.weight", "b.weight"])
def test_weights_of_tied_tensors_may_be_there_once(tmp_path: Path, kept: str) -> None:
    from tersor.resolve import put_in

    state = {"a.bias": torch.zeros(4), "b.bias": torch.ones(4), kept: torch.full((4, 4), 2.0)}
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    model = Tied()
    put_in(model, str(tmp_path / "w.safetensors"))
    assert model.a.weight is model.b.weight
    assert torch.equal(model.a.weight, state[kept])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"0.bias": None}, "it lacks 0.bias, which the model has"),
        ({"0.bios": torch.zeros(1)}, "it has 0.bios, which the model lacks; did you mean '0.bias'?"),
        ({"0.bias": torch.zeros(3)}, r"0.bias has shape \[3\], but the model's has \[2\]"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    tmp_path: Path, change: dict[str, torch.Tensor], says: str
) -> None:
    from tersor.resolve import put_in

    model = nn.Sequential(nn.Linear(3, 2))
    state = {name: value for name, value in {**model.state_dict(), **change}.items() if value is not None}
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(RefusedError, match=says):
        put_in(model, str(tmp_path / "w.safetensors"))


@pytest.mark.extra
def test_torchvision_gives_architectures() -> None:
    pytest.importorskip("torchvision")
    assert "conv1.weight" in resolve_model("torchvision:resnet18").sites
    with pytest.raises(SettingError, match="did you mean 'resnet18'"):
        resolve_model("torchvision:resnet81")


def test_a_users_metric_has_its_name_and_unit(tersor: Command) -> None:
    text = Path("mine.py").read_text().replace('"thirds", ', '"thirds", metric=likelihood, ')
    Path("mine.py").write_text(
        text + "\ndef likelihood(output, target):\n"
        "    return output.softmax(1).gather(1, target[:, None])[:, 0]\n"
    )
    facts = tersor(f"{RUN} o prune keep=0.9").json
    assert facts["metric"] == "likelihood"
    assert 0 < facts["accuracy"]["after"][0] < 1
    done = tersor("run mine.py:net --task mine.py:task -q --out o2 prune keep=0.9")
    assert "likelihood  " in done.out
    assert "points" not in done.out.split("file, bytes")[0]
