"""`tersor steps`: every setting with its default and what it depends on, as the steps declare them."""

import dataclasses
import io

import pytest
from rich.console import Console

from tersor.errors import SettingError
from tersor.report.steps_table import described, tables
from tersor.setting_effects import only
from tersor.steps import STEPS


def printed(step: str | None) -> list[str]:
    out = io.StringIO()
    for part in tables(described(step)):
        Console(file=out, width=200, markup=False).print(part)
    return out.getvalue().splitlines()


@pytest.mark.parametrize("name", STEPS)
def test_every_setting_is_listed_with_what_it_depends_on(name: str) -> None:
    (found,) = described(name)["steps"]
    fields = {field.name: field for field in dataclasses.fields(STEPS[name])}
    assert set(found["settings"]) == set(fields)
    needs, lines = only(STEPS[name]), printed(name)
    for key, field in fields.items():
        assert found["settings"][key]["default"] == field.default
        (line,) = [line for line in lines if line.split()[:1] == [key]]
        for other in needs.get(key, {}):
            assert other in line.removeprefix(f" {key}")
        assert bool(needs.get(key)) == bool(found["settings"][key]["with"])


def test_without_a_name_all_steps_are_listed() -> None:
    assert [line.split()[0] for line in printed(None)] == ["step", *STEPS, "Settings:"]


def test_its_own_settings_come_before_those_of_training() -> None:
    names = list(described("quantize")["steps"][0]["settings"])
    assert names.index("bits") < names.index("epochs")


def test_a_misspelt_step_is_refused() -> None:
    with pytest.raises(SettingError, match="did you mean 'quantize'"):
        described("quantise")
