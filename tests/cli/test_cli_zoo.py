"""`tersor zoo`: what it prints is counted."""

from command_line import Command

from tersor.errors import MissingError
from tersor.zoo.architectures import ZOO, zoo_model


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
