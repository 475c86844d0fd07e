"""README and guide agree with the steps' own docstrings and settings."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from tersor.effects import only
from tersor.steps import STEPS
from tersor.steps.retrain import TRAINING, Retrain

ROOT = Path(__file__).resolve().parents[1]
README, GUIDE = (ROOT / "README.md").read_text(), (ROOT / "docs/guide.md").read_text()


def shown(default: Any) -> str:
    """A default in the style of the tables."""
    text = "none" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
    return f"`{text}`" if text else ""


def rows(text: str) -> dict[str, str]:
    """Setting -> default, of the first table in a text."""
    return {key: default for key, (default, _) in table(text).items()}


def table(text: str) -> dict[str, tuple[str, str]]:
    """Setting -> (default, what it is), of the first table in a text."""
    lines = text.split("| --- | --- | --- |\n", 1)[1].split("\n\n", 1)[0]
    found = re.findall(r"^\| `(\w+)` \| (\S*) \| (.+) \|$", lines, re.M)
    return {key: (default, said) for key, default, said in found}


def defaults(kind: type[Any]) -> dict[str, str]:
    return {field.name: shown(field.default) for field in dataclasses.fields(kind)}


def test_the_readme_lists_every_step_in_its_own_words() -> None:
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
def test_the_guide_names_dependencies_of_settings(name: str) -> None:
    training, section = (GUIDE.split(f"\n{head}\n", 1)[1] for head in ("## Steps", f"### {name}"))
    assert "All but `where` have an effect with `epochs` above 0 alone" in training
    cells = {**table(training), **table(section)}
    for key, needs in only(STEPS[name]).items():
        for other in needs:
            assert (key in TRAINING and other == "epochs") or f"`{other}" in cells[key][1], (key, other)


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    assert len(README.splitlines()) <= 150
    for page, folder in ((README, ROOT), (GUIDE, ROOT / "docs")):
        for link in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", page):
            assert (folder / link).exists(), link
