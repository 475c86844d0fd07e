"""`tersor zoo`: what it prints is counted."""

import json

from command_line import Command

from tersor.errors import MissingError
from tersor.zoo.architectures import ZOO, zoo_model
from tersor.zoo.measured import FILE


def test_zoo_prints_what_it_counted(tersor: Command) -> None:
    found = tersor("zoo", "--json").json["zoo"]
    assert [item["name"] for item in found] == list(ZOO)
    for item in found:
        try:
            net = zoo_model(item["name"])
        except MissingError:
            assert item["parameters"] is None
            assert "pip install" in item["missing"]
            continue
        assert item["parameters"] == sum(p.numel() for p in net.parameters())
        assert item["macs"] > 27 * 8 * 48 * 48  # of the first convolution alone
    for name in ZOO:
        assert name in tersor("zoo").out
    assert "tersor run zoo:yolo_lite" in tersor("zoo", "yolo_lite").out
    wrong = tersor("zoo", "yolo")
    assert wrong.code == 2
    assert "did you mean" in wrong.err


def test_zoo_shows_what_was_measured(tersor: Command) -> None:
    rows = {row["name"]: row for row in map(json.loads, FILE.read_text().splitlines())}
    items = {item["name"]: item for item in tersor("zoo", "--json").json["zoo"]}
    assert len(rows) > 5
    for name, item in items.items():
        if name not in rows:
            assert item["measured"] is None
            assert item["suits"] == {}
            continue
        assert item["measured"]["metric"][1] == rows[name]["accuracy"]["after"][0]
        assert item["measured"]["milliseconds"][1] == rows[name]["latency"]["after"][0]
        out = tersor("zoo", name).out
        assert f"{rows[name]['bytes']['packed'] / 1000:,.0f}" in out
        assert "u{" not in out  # commands to copy stand on lines of their own
    for metric in ("accuracy", "AP50"):
        rivals = [item for item in items.values() if item["metric"] == metric and item["measured"]]
        for target, key, best in (("cloud", "metric", max), ("mobile", "milliseconds", min)):
            won = {item["name"] for item in rivals if target in item["suits"]}
            top = best(item["measured"][key][1] for item in rivals)
            assert won == {item["name"] for item in rivals if item["measured"][key][1] == top}
