"""bench/bytes.py: inputs follow their formulas, missing peers are named, figures are of whole leaves."""

from types import ModuleType

import numpy as np
import pytest
import torch


def test_codes_are_those_of_a_scale_a_row_and_of_a_scale_a_group(bench):
    w = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    for found, group, top in ((bench("codes").per_row(w), 256, 127), (bench("codes").per_group(w), 128, 7)):
        assert found.shape == (3, 256)
        for at, (value, code) in enumerate(zip(w.flatten().tolist(), found.ravel().tolist(), strict=True)):
            start = at // group * group
            scale = max(abs(v) for v in w.flatten()[start : start + group].tolist()) / top
            assert abs(value / scale - code) <= 0.5 + 1e-4


def test_a_mask_ramp_prunes_the_share_it_is_asked_for(bench):
    drawn = torch.Generator().manual_seed(0)
    ws = [torch.nn.Parameter(torch.randn(shape, generator=drawn)) for shape in ((40, 50), (30, 40), (10, 30))]
    masks = bench("lenets").masks_at(ws, 0.9)
    pruned = [1 - float(mask.float().mean()) for mask in masks]
    assert pruned[-1] == pytest.approx(0.7, abs=0.01)
    assert pruned[0] == pytest.approx(0.9, abs=0.02)


def test_shared_values_are_one_for_each_code_and_zero_is_pruned(bench):
    w = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    w[w.abs() < 1] = 0
    index, book = bench("lenets").shared(w)
    assert torch.equal(index == 0, w == 0)
    assert int(index.max()) <= len(book) == 32
    near = torch.cat([torch.zeros(1), book])[index.long()]
    assert float((near - w).abs().max()) < float((w.max() - w.min()) / 31)


def test_four_bit_codes_are_packed_two_to_a_byte(bench):
    q = np.array([[-7, 7, 0], [3, -1, 5]], dtype=np.int8)
    packed = np.frombuffer(bench("peers").plain({"q": q}, "int4"), np.uint8)
    nibbles = np.stack([packed & 15, packed >> 4], axis=1).ravel()
    assert (nibbles.astype(int) - 8).tolist() == q.ravel().tolist()


def test_a_peer_that_is_not_installed_is_said_so_and_has_no_figure(bench, monkeypatch):
    peers = bench("peers")

    def none(name: str) -> ModuleType:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(peers.importlib, "import_module", none)
    ready, said = peers.prepare({"q": np.zeros((4, 4), np.int8)}, "int8")
    assert not ready
    assert set(said) == set(peers.PEERS)
    assert all(set(facts) == {"missing"} and "not installed" in facts["missing"] for facts in said.values())


def test_a_peer_that_returns_something_else_has_no_figure(bench, monkeypatch):
    peers = bench("peers")
    wrong = peers.Prepared(1, lambda: b"wrong", lambda found: found == b"right")
    monkeypatch.setattr(peers, "PEERS", {"wrong": lambda arrays, kind: wrong})
    ready, said = peers.prepare({"q": np.zeros((4, 4), np.int8)}, "int8")
    assert not ready
    assert "did not return" in said["wrong"]["missing"]


@pytest.mark.parametrize("kind", ["int8", "bf16"])
def test_rows_without_peers_are_our_own_and_the_sizes_are_of_whole_leaves(bench, monkeypatch, kind):
    byte = bench("bytes")
    drawn = torch.Generator().manual_seed(0)
    w = torch.randn(64, 96, generator=drawn)
    tensors = {"w": (30 * w).round().to(torch.int8) if kind == "int8" else w.to(torch.bfloat16)}
    name = "minilm_int8" if kind == "int8" else "minilm_bf16"
    monkeypatch.setitem(byte.SUBJECTS, name, byte.Subject(kind, lambda: tensors))
    monkeypatch.setattr(bench("peers"), "PEERS", {})

    class NoPeers:
        said = {"nncodec": {"missing": "not installed"}}
        ready: list[str] = []
        encoders: list[str] = []

        def __init__(self, *given: object) -> None: ...

        def close(self) -> None: ...

    monkeypatch.setattr(byte, "Peers", NoPeers)
    rows = {row.measure: row for row in byte.measure(name, "python", 1)}
    assert not any(
        peer in measure for measure in rows for peer in ("nncodec", "zipnn", "zstd", "constriction")
    )
    size = float(rows["size, Tersor"].value)
    leaf = min(byte.coded(tensors["w"], coder=profile).nbytes for profile in byte.PROFILES)
    scale = 8 / w.numel() if kind == "int8" else 100 / tensors["w"].nbytes
    assert size == pytest.approx(leaf * scale, rel=1e-3)


def test_encoding_is_timed_beside_a_peer_in_each_round(bench):
    """The ratio is the median over rounds of the peer's seconds by ours, and the peer is asked to encode."""
    byte, asked = bench("bytes"), []

    class OnePeer:
        encoders = ("zipnn",)

        def time(self, job: str):
            asked.append(job)
            return byte.Took(10.0, 20.0)

    tensors = {"w": torch.randn(64, 96, generator=torch.Generator().manual_seed(0))}
    took = byte.encoding_turns(tensors, "fast", OnePeer(), 3)
    rows = {row.measure: row for row in byte.encoding_rows("minilm_fp32", tensors, took)}
    assert asked == ["encode zipnn"] * 3
    ours = sorted(each.wall for each in took["Tersor"])[1]
    assert float(rows["encode, times zipnn's speed"].value) == pytest.approx(10 / ours, rel=1e-3)
    assert rows["encode, times zipnn's speed"].target == ">= 0.8"
