"""hf:FOLDER as a MODEL, and folders of transformers through pack, run and unpack. Nothing is downloaded."""

import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Command
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tersor.errors import MissingError, RefusedError, SettingError
from tersor.model.transformers_folder import transformers_model

SENTENCES = ["the weights are small", "a small net", "the net"]
TASK = """
import torch, tersor
from transformers import AutoTokenizer

def task():
    tokens = AutoTokenizer.from_pretrained("given")(SENTENCES, padding=True, return_tensors="pt")
    batch = {name: tokens[name] for name in ("input_ids", "attention_mask")} | {"labels": torch.arange(3)}
    return tersor.Task("words", evaluate=[batch], calibrate=[batch])
""".replace("SENTENCES", repr(SENTENCES))


@pytest.fixture
def transformers(monkeypatch: pytest.MonkeyPatch) -> Any:
    """transformers, without a network."""

    def refuse(*_: object) -> None:
        raise AssertionError("a connection was made")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return pytest.importorskip("transformers")


def saved(transformers: Any, path: Path, **more: Any) -> Any:
    """A tiny classifier and its tokenizer, as save_pretrained writes them."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "[UNK]", *dict.fromkeys(" ".join(SENTENCES).split())]
    tokens = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, num_labels=3, max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(path, **more)
    return model


def scores(transformers: Any, path: Path) -> torch.Tensor:
    """What a folder computes, read by transformers alone."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        path, local_files_only=True
    ).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    with torch.no_grad():
        found: torch.Tensor = model(**tokens(SENTENCES, padding=True, return_tensors="pt")).logits
    return found


@pytest.mark.extra
@pytest.mark.parametrize("shards", [None, "20kB"])
def test_a_folder_comes_back_for_transformers(shards: str | None, transformers: Any, tersor: Command) -> None:
    saved(transformers, Path("given"), **({"max_shard_size": shards} if shards else {}))
    expected = scores(transformers, Path("given"))
    facts = tersor("pack given -o m.tersor --json -q").json
    assert facts["attached"].keys() >= {"config.json", "tokenizer.json", "tokenizer_config.json"}
    assert facts["ignored"] == {}
    for line in ("-o back/", "-o many/ --shard 30kB", "-o one/ --shard 1GB"):
        assert tersor(f"unpack m.tersor {line} -q").code == 0
        out = Path(line.split()[1])
        assert torch.equal(scores(transformers, out), expected)
        for name in facts["attached"]:
            assert (out / name).read_bytes() == Path("given", name).read_bytes()
    assert sorted(path.name for path in Path("back").iterdir()) == sorted(
        path.name for path in Path("given").iterdir()
    )


@pytest.mark.extra
def test_a_run_on_a_folder_and_back(transformers: Any, tersor: Command) -> None:
    saved(transformers, Path("given"))
    Path("words.py").write_text(TASK)
    done = tersor("run hf:given --task words.py:task --out out quantize bits=8 entropy -q --json")
    assert done.code == 0, done.err
    assert tersor("unpack out/model.tersor -o back/ -q").code == 0
    expected = scores(transformers, Path("given"))
    error = (scores(transformers, Path("back")) - expected).norm() / expected.norm()
    assert 0 < error < 0.05  # 8 bits
    # The same file as a candidate and continued, with the folder as its code.
    found = tersor("eval out/model.tersor --model hf:given --task words.py:task --json -q")
    assert found.code == 0, found.err
    again = tersor(
        "run out/model.tersor --arch hf:given --task words.py:task --out more entropy coder=fast -q"
    )
    assert again.code == 0, again.err
    assert tersor("unpack more/model.tersor -o later/ -q").code == 0
    assert torch.equal(scores(transformers, Path("later")), scores(transformers, Path("back")))


@pytest.mark.extra
def test_the_dtype_is_the_folders(transformers: Any, tmp_path: Path) -> None:
    given = saved(transformers, tmp_path / "given").to(torch.bfloat16)
    given.save_pretrained(tmp_path / "given")
    model = transformers_model(tmp_path / "given")
    assert type(model) is type(given)
    assert not model.training
    found = model.state_dict()
    assert found.keys() == given.state_dict().keys()
    assert all(found[n].dtype == t.dtype and torch.equal(found[n], t) for n, t in given.state_dict().items())


@pytest.mark.extra
def test_weights_that_would_be_random_are_refused(transformers: Any, tmp_path: Path) -> None:
    saved(transformers, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file(
        {n: t for n, t in state.items() if "classifier" not in n},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(RefusedError, match=r"its weights lack classifier\.bias, classifier\.weight"):
        transformers_model(tmp_path)


@pytest.mark.extra
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architectures": ["NoSuchModel"]}, "has no model 'NoSuchModel'"),
        ({"architectures": ["os"]}, "has no model 'os'"),
        (
            {"model_type": "no-such-type", "auto_map": {"AutoConfig": "code.Config"}},
            "transformers cannot load it",
        ),
    ],
)
def test_a_class_that_transformers_lacks(
    change: dict[str, Any], said: str, transformers: Any, tersor: Command, tmp_path: Path
) -> None:
    saved(transformers, tmp_path / "given")
    (tmp_path / "given/code.py").write_text("raise SystemExit('code of the folder was run')")
    config = json.loads((tmp_path / "given/config.json").read_text())
    (tmp_path / "given/config.json").write_text(json.dumps(config | change))
    done = tersor("run hf:given --out out prune")
    assert (done.code, said in done.err) == (1, True), done.err


@pytest.mark.extra
def test_an_adapter_and_its_metadata(transformers: Any, tersor: Command) -> None:
    """As peft writes one: adapter_model.safetensors with metadata, adapter_config.json."""
    Path("lora").mkdir()
    tensors = {f"base_model.model.q.lora_{x}.weight": torch.randn(4, 4) for x in "AB"}
    save_file(tensors, "lora/adapter_model.safetensors", {"format": "pt", "r": "8"})
    Path("lora/adapter_config.json").write_text('{"base_model_name_or_path": "org/net", "peft_type": "LORA"}')
    assert tersor("pack lora -o m.tersor -q").code == 0
    assert tersor("unpack m.tersor -o back/ -q").code == 0
    with safe_open("back/adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "r": "8"}
    done = tersor("run hf:lora --out out prune")  # transformers would look for org/net
    assert (done.code, "holds an adapter" in done.err) == (2, True)


# --- without transformers ---


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="there is no such folder. Only local folders are read"):
        transformers_model(tmp_path / "org" / "model")
    with pytest.raises(SettingError, match=r"it has no config\.json"):
        transformers_model(tmp_path)


def test_the_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingError, match=r"pip install 'tersor\[transformers\]'"):
        transformers_model(tmp_path)


def test_a_folder_made_by_hand(tersor: Command) -> None:
    """The files of a Hugging Face folder, without its packages."""
    Path("given").mkdir()
    save_file({"w": torch.randn(64, 64)}, "given/model.safetensors", {"format": "pt"})
    for name, text in {"config.json": '{"architectures": ["Net"]}', "vocab.txt": "a\nb\n"}.items():
        Path("given", name).write_text(text)
    Path("given/video.mp4").write_bytes(b"0" * 100_000)
    Path("given/training_args.bin").write_bytes(b"not opened")
    first, second, *rest = tersor("pack given -o m.tersor -q").out.splitlines()
    nbytes = sum(
        Path("given", name).stat().st_size for name in ("model.safetensors", "config.json", "vocab.txt")
    )
    assert first == f"given: {nbytes:,} bytes"
    assert second.endswith(f"{nbytes / Path('m.tersor').stat().st_size:.2f} x smaller")
    assert rest == [
        "attached: config.json, vocab.txt (30 bytes)",
        "left out: training_args.bin (a file), video.mp4 (a file)",
    ]
    assert tersor("unpack m.tersor -o back/ -q").code == 0
    names = ["config.json", "model.safetensors", "vocab.txt"]
    assert sorted(path.name for path in Path("back").iterdir()) == names
    done = tersor("unpack m.tersor -o w.safetensors")
    assert "not written: config.json, vocab.txt" in done.err
    assert tersor("unpack m.tersor -o back/").code == 1  # it is there already
    plain = tersor("pack given -o n.tersor --no-attach -q --json").json
    assert (plain["attached"], plain["ignored"].keys() >= {"config.json", "vocab.txt"}) == ({}, True)
