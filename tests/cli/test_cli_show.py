"""tersor show --html: the page is written, its path is printed, and the file is not overwritten."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from command_line import Command
from forge import ROOT

GOLDEN = ROOT / "tests" / "golden"


def packed(tersor: Command) -> Command:
    drawn = torch.Generator().manual_seed(0)
    weights = {"a.weight": torch.randn(20, 30, generator=drawn), "a.bias": torch.zeros(20)}
    safetensors.torch.save_file(weights, "w.safetensors")
    assert tersor("pack w.safetensors -o m.tersor -q quantize bits=4 entropy").code == 0
    return tersor


def test_the_page_is_written_beside_the_tables(tersor: Command) -> None:
    done = packed(tersor)("show --html out/page.html m.tersor")
    assert done.code == 0
    assert "written to out/page.html" in done.out
    assert "a.weight" in Path("out/page.html").read_text()
    facts = tersor("show m.tersor --html page.html --json").json
    assert facts["html"] == {"name": "page.html", "nbytes": Path("page.html").stat().st_size}


def test_the_tables_show_bytes_entropy_distance_and_the_rest_of_the_file(tersor: Command) -> None:
    done = packed(tersor)("show m.tersor")
    for word in ("bytes", "bits", "order 0", "distance", "share", "all of these", "text", "header"):
        assert word in done.out
    facts = tersor("show m.tersor --json").json
    assert sum(facts["parts"].values()) == Path("m.tersor").stat().st_size
    site = facts["sites"]["a.weight"]
    assert f"{100 * (8 * site['nbytes'] / site['order0'] - 1):+.2f} %" in done.out


@pytest.mark.parametrize("columns", ["30", "100", ""])
def test_long_names_are_shown_to_their_ends(
    tersor: Command, monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    """Without a terminal, lines have no width limit and names are in one piece."""
    names = [f"encoder.layer.0.attention.self.{part}.of.a.very.long.module.in.a.long.{part}.weight"
             for part in ("query", "query.key", "query.key.value")]  # fmt: skip
    safetensors.torch.save_file({name: torch.randn(20, 30) for name in names}, "w.safetensors")
    assert tersor("pack w.safetensors -o m.tersor -q quantize bits=4 entropy").code == 0
    if columns:
        monkeypatch.setattr("sys.stdout.isatty", lambda: True)
        monkeypatch.setenv("COLUMNS", columns)
        monkeypatch.setenv("TERM", "dumb")
    out = tersor("show m.tersor").out
    cells = [line[1:].split("  ")[0].strip() for line in out.splitlines()]
    assert all(name in ("".join(cells) if columns else cells) for name in names)
    assert "order 0" in out


def test_the_file_itself_is_not_taken_for_the_page(tersor: Command) -> None:
    packed(tersor)
    before = Path("m.tersor").read_bytes()
    done = tersor("show m.tersor --html m.tersor")
    assert done.code == 2
    assert "is also the input" in done.err
    assert Path("m.tersor").read_bytes() == before


def test_cuts_are_shown_with_the_shape_as_given(tersor: Command) -> None:
    file = GOLDEN / "cuts.tersor"
    facts = tersor(f"show {file} --json").json
    assert facts["sites"]["conv.weight"]["shape"] == [4, 2, 2, 2]
    assert facts["sites"]["conv.weight"]["given"] == [8, 3, 2, 2]
    assert "given" not in facts["sites"]["all.weight"]
    assert "4 of 8" in tersor(f"show {file} conv.bias").out


def test_what_else_a_file_holds_is_shown(tersor: Command) -> None:
    """The bytes of all parts add up to the file's."""
    for name, said in (
        ("grids", ("conv/conv2d:0", "stale", "-2048", "of edges of the graph")),
        ("replaced", ("replaced: product layers=2", "num_heads = 1", "the model")),
        ("attachments", ("config.json", "1,234", "onnx/model of café.onnx", "files that go with")),
        ("history", ("2 quantize", "only its name is kept", "3 prune", "keep=0.25")),
        ("tiny-grids", ("conv/relu:0", "12")),
    ):
        file = GOLDEN / f"{name}.tersor"
        done = tersor(f"show {file}")
        assert done.code == 0
        assert [word for word in said if word not in done.out] == []
        facts = tersor(f"show {file} --json").json
        assert sum(facts["parts"].values()) == file.stat().st_size
        assert facts["parts"]["payload"] == facts["sum"]["nbytes"]
    replaced = tersor(f"show {GOLDEN / 'replaced.tersor'} --json").json
    assert replaced["sites"]["fc.1.weight"]["origin"] == "fc.weight left"


def test_names_do_not_reach_the_terminal_raw(tersor: Command, tmp_path: Path) -> None:
    names = ("\x1b[31mred\x1b[0m", "x\u202egnp.exe", "bell\x07")
    safetensors.torch.save_file({name: torch.randn(40, 40) for name in names}, tmp_path / "w.safetensors")
    assert tersor(f"pack {tmp_path}/w.safetensors -o {tmp_path}/m.tersor -q").code == 0
    for line in (
        f"show {tmp_path}/m.tersor",
        f"verify {tmp_path}/m.tersor",
        f"show {tmp_path}/m.tersor nosuch",
    ):
        done = tersor(line)
        assert not set("\x1b\u202e\x07") & set(done.out + done.err), line
    assert "\\u{1b}[31mred" in tersor(f"show {tmp_path}/m.tersor").out


def test_groups_lists_what_can_be_cut_and_what_stays(tersor: Command) -> None:
    facts = tersor("show mine.py:net --groups --task mine.py:task --json").json
    assert facts["families"] == [
        {"family": "0.weight:0", "units": 48, "parameters": 6 + 1 + 3, "together": 48 * (6 + 1 + 3),
         "counted": [], "tensors": ["0.weight:0", "0.bias:0", "2.weight:1"]}
    ]  # fmt: skip
    assert facts["kept"] == {"input": 6, "output": 3}
    assert facts["model"]["parameters"] == 6 * 48 + 48 + 48 * 3 + 3
    done = tersor("show mine.py:net --groups --task mine.py:task")
    assert "0.weight:0" in done.out
    assert "exact" in done.out
    refused = tersor("show mine.py:net --groups")
    assert refused.code == 2
    assert "Give --task" in refused.err


def test_a_slim_network_from_the_command_line(tersor: Command) -> None:
    words = "slim keep=0.5 epochs=1 lr=0.01 entropy"
    done = tersor(f"run mine.py:net --task mine.py:task --out out --json {words}")
    assert done.code == 0
    assert done.json["sites"]["0.weight"]["weights"] == 24 * 6
    shown = tersor("show out/model.tersor")
    assert "slim" in shown.out
    again = tersor(
        "run out/model.tersor --arch mine.py:net --task mine.py:task --out out2 --json finetune epochs=1"
    )
    assert again.code == 0


# --- what is no .tersor file ---


def checkpoint(path: Path) -> dict[str, torch.Tensor]:
    path.mkdir()
    tensors = {
        "fc.weight": torch.randn(20, 30), "fc.bias": torch.zeros(20, dtype=torch.float16),
        "bn.running_mean": torch.zeros(20), "fc.scales": torch.ones(3, 4),
    }  # fmt: skip
    safetensors.torch.save_file(tensors, path / "model.safetensors", {"format": "pt", "r": "8"})
    torch.save(tensors, path.with_suffix(".pt"))
    (path / "config.json").write_text("{}")
    (path / "video.mp4").write_bytes(b"0" * 1000)
    return tensors


@pytest.mark.parametrize("name", ["given", "given/model.safetensors", "given.pt"])
def test_weights_are_shown_with_what_pack_would_do(name: str, tersor: Command) -> None:
    tensors = checkpoint(Path("given"))
    facts = tersor(f"show {name} --json").json
    assert {
        n: (found["shape"], found["dtype"], found["nbytes"]) for n, found in facts["tensors"].items()
    } == {n: (list(t.shape), str(t.dtype).removeprefix("torch."), t.nbytes) for n, t in tensors.items()}
    assert {n: found["steps"] for n, found in facts["tensors"].items()} == {
        "fc.weight": "change it", "fc.bias": "only code it", "fc.scales": "leave it: scale",
        "bn.running_mean": "leave it: running statistics",
    }  # fmt: skip
    # What it says of pack is what pack does.
    done = tersor(f"pack {name} -o m.tersor --json -q quantize bits=4").json
    assert (done["attached"], done["ignored"]) == (facts["attached"], facts["ignored"])
    assert done["left"] == {"running statistics": ["bn.running_mean"], "scale": ["fc.scales"]}
    sites = tersor("show m.tersor --json").json["sites"]
    assert {name for name, site in sites.items() if site["form"].startswith("Affine")} == {"fc.weight"}
    text = tersor(f"show {name}").out
    for word in ("20 x 30", "float16", "2,400", "leave it: scale", "tersor pack WEIGHTS"):
        assert word in text
    assert ("metadata of model.safetensors: format=pt, r=8" in text) == (name != "given.pt")
    assert ("left out: video.mp4 (a file)" in text) == (name == "given")
    assert ("pack attaches: config.json" in text) == (name == "given")


def test_some_of_the_weights(tersor: Command) -> None:
    checkpoint(Path("given"))
    found = tersor("show given fc.* --json").json["tensors"]
    assert sorted(found) == ["fc.bias", "fc.scales", "fc.weight"]
    done = tersor("show given fd.*")
    assert (done.code, "no site 'fd.*'" in done.err) == (2, True)
    assert tersor("show given --html p.html").code == 2
    assert not Path("p.html").exists()


def test_one_of_several_networks(tersor: Command) -> None:
    torch.save({"g": {"w": torch.ones(2, 2)}, "d": {"v": torch.ones(3)}}, "gan.pt")
    assert list(tersor("show gan.pt --json").json["tensors"]) == ["g.w", "d.v"]
    facts = tersor("show gan.pt --key g --json").json
    assert (list(facts["tensors"]), facts["key"]) == (["w"], "g")
    assert tersor(f"show {GOLDEN / 'model.tersor'} --key g").code == 2


def test_a_report_and_the_folder_of_a_run(tersor: Command) -> None:
    ran = tersor("run mine.py:net --out out -q prune keep=0.3 entropy").out
    assert tersor("show out/report.json").out == ran
    facts = tersor("show out/report.json 0.* --json").json
    assert list(facts["sites"]) == ["0.weight", "0.bias"]
    assert tersor("show out --json").json == tersor("show out/model.tersor --json").json


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}", "it lacks base, result, ledger, bits and 2 more"),
        ('{"base": 1, "result": 1, "ledger": 1, "bits": 1, "steps": 1, "sites": 1}', "not the report.json"),
        (
            '{"base": 1, "result": 1, "ledger": 1, "bits": {}, "steps": [], "sites": {}}',
            "not the report.json",
        ),
        ('{"base": ', "not the report.json"),
        ('{"a": "\xff"', "not the report.json"),
        ('{"a":' * 100_000, "not the report.json"),
    ],
    ids=["empty", "numbers", "no bits", "cut", "no utf-8", "deep"],
)
def test_another_json_is_refused(text: str, said: str, tersor: Command) -> None:
    Path("report.json").write_text(text, encoding="latin-1")
    done = tersor("show report.json")
    assert (done.code, said in done.err) == (1, True), done.err


def test_a_patch_is_named_as_one(tersor: Command) -> None:
    packed(tersor)
    assert tersor("diff w.safetensors m.tersor -o p -q").code == 0
    done = tersor("show p")
    assert (done.code, "it is a patch, which changes another file" in done.err) == (1, True), done.err


def test_the_largest_are_shown_and_all_on_request(tersor: Command) -> None:
    weights = {f"layer{n}.weight": torch.randn(n + 2, 8) for n in range(30)}
    weights |= {f"norm{n}.running_mean": torch.randn(8) for n in range(30)}
    safetensors.torch.save_file(weights, "w.safetensors")
    assert tersor("pack w.safetensors -o m.tersor -q quantize bits=4").code == 0
    done = tersor("show m.tersor")
    rows = [line.split()[0] for line in done.out.splitlines() if line.startswith(" layer")]
    assert rows == [f"layer{n}.weight" for n in range(29, 4, -1)]
    (more,) = [line for line in done.out.splitlines() if line.startswith(" 5 more sites ")]
    (buffers,) = [line for line in done.out.splitlines() if line.startswith(" 30 buffers ")]
    assert buffers.split()[2] == "960"
    facts = tersor("show m.tersor --json").json
    assert more.split()[3] == f"{sum(facts['sites'][f'layer{n}.weight']['nbytes'] for n in range(5))}"
    assert "Affine(4 bits) " in done.out
    assert "--all shows every row" in done.out
    assert len(done.out.splitlines()) < 48, "a screen"
    every = tersor("show m.tersor --all").out
    assert all(f" {name} " in every for name in weights)
    assert "Dense int8" in every
    assert "Dense int8" not in done.out
    some = tersor("show", "m.tersor", "layer*").out
    assert all(f" layer{n}.weight " in some for n in range(30))


def test_a_run_has_a_row_for_every_layer_on_request(tersor: Command) -> None:
    Path("deep.py").write_text(
        "from torch import nn\ndef net(): return nn.Sequential(*(nn.Linear(4, 4) for _ in range(20)))\n"
    )
    done = tersor("run deep.py:net --out a -q quantize bits=4")
    assert "15 more layers, 240 bytes" in done.out
    every = tersor("run deep.py:net --out b -q --all quantize bits=4").out
    assert all(f" {n}.{word} " in every for n in range(20) for word in ("weight", "bias"))


@pytest.mark.parametrize("columns", ["60", "80", "200"])
def test_names_of_groups_are_never_cut(
    tersor: Command, monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    """Their ends tell them apart."""
    name = "encoder_with_a_long_name_in_many_words_of_letters"
    Path("long.py").write_text(
        "import torch\nfrom torch import nn\nimport tersor\n"
        f"class Inner(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        f"        self.{name}_first_projection = nn.Linear(6, 8)\n"
        f"        self.{name}_second_projection = nn.Linear(8, 3)\n"
        f"    def forward(self, x):\n"
        f"        return self.{name}_second_projection(self.{name}_first_projection(x).relu())\n"
        "def net(): return nn.Sequential(Inner())\n"
        "def task(): return tersor.Task('t', evaluate=[(torch.randn(4, 6), torch.zeros(4).long())])\n"
    )
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERM", "dumb")
    out = tersor("show long.py:net --groups --task long.py:task").out
    assert "\u2026" not in out
    letters = "".join(out.split())
    shown = tersor("show long.py:net --groups --task long.py:task --json").json["families"][0]["tensors"]
    assert len(shown) == 3
    cells = {"".join(piece for piece in column) for column in columns_of(out)}
    assert all(any(tensor in cell for cell in cells) for tensor in shown), (letters, cells)


def columns_of(out: str) -> list[list[str]]:
    """The pieces of each column of the first table, from top to bottom."""
    lines = out.splitlines()
    (at,) = [n for n, line in enumerate(lines) if set(line.strip()) == {"\u2500"}][:1]
    head = lines[at - 1]
    starts = [n for n, letter in enumerate(head) if letter != " " and (n == 0 or head[n - 2 : n].isspace())]
    found: list[list[str]] = []
    for start, end in zip(starts, [*starts[1:], None], strict=True):
        rows = [line[start:end].strip() for line in lines[at + 1 :]]
        found.append([row for row in rows if row])
    return found
