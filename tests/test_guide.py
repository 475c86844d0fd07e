"""Guide: its tables and the README's agree with the steps' docstrings, settings and defaults."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from tersor.setting_effects import only
from tersor.steps import STEPS
from tersor.steps.retrain import TRAINING, Retrain

ROOT = Path(__file__).resolve().parents[1]
README, GUIDE, COMING = (
    (ROOT / path).read_text() for path in ("README.md", "docs/guide.md", "docs/coming-from.md")
)


def shown(default: Any) -> str:
    """A default value, formatted as in the tables."""
    text = "none" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
    return f"`{text}`" if text else ""


def rows(text: str) -> dict[str, str]:
    """Setting -> default, from the first table in a text."""
    return {key: default for key, (default, _) in table(text).items()}


def table(text: str) -> dict[str, tuple[str, str]]:
    """Setting -> (default, description), from the first table in a text."""
    lines = text.split("| --- | --- | --- |\n", 1)[1].split("\n\n", 1)[0]
    found = re.findall(r"^\| `(\w+)` \| (\S*) \| (.+) \|$", lines, re.M)
    return {key: (default, description) for key, default, description in found}


def defaults(kind: type[Any]) -> dict[str, str]:
    return {field.name: shown(field.default) for field in dataclasses.fields(kind)}


def test_the_readme_lists_every_step_with_its_docstring() -> None:
    found = re.findall(r"^\| `(\w+)` \| (.+) \|$", README, re.M)
    assert found == [(name, (kind.__doc__ or "").splitlines()[0]) for name, kind in STEPS.items()]


@pytest.mark.parametrize("name", STEPS)
def test_the_guide_lists_every_setting_and_its_default(name: str) -> None:
    kind, section = STEPS[name], GUIDE.split(f"\n### {name}\n", 1)[1]
    assert section.strip().startswith((kind.__doc__ or "").splitlines()[0])
    common = defaults(Retrain) if issubclass(kind, Retrain) else {}
    own = {key: value for key, value in defaults(kind).items() if common.get(key) != value}
    assert rows(section) == own


def test_the_guide_lists_the_settings_of_training() -> None:
    assert rows(GUIDE.split("\n## Steps\n", 1)[1]) == defaults(Retrain)


@pytest.mark.parametrize("name", STEPS)
def test_the_guide_names_the_settings_that_a_setting_depends_on(name: str) -> None:
    training, section = (GUIDE.split(f"\n{head}\n", 1)[1] for head in ("## Steps", f"### {name}"))
    assert "All except `where` take effect only with `epochs` above 0" in training
    rows_of = {**table(training), **table(section)}
    for key, needs in only(STEPS[name]).items():
        for other in needs:
            assert (key in TRAINING and other == "epochs") or f"`{other}" in rows_of[key][1], (key, other)


def test_the_readme_is_short_and_links_exist() -> None:
    assert len(README.splitlines()) <= 155
    for page, folder in ((README, ROOT), (GUIDE, ROOT / "docs"), (COMING, ROOT / "docs")):
        for link in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", page):
            assert (folder / link).exists(), link
