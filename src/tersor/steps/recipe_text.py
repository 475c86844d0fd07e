"""Recipe text: recipes as YAML or as words of a command line, and back.

YAML             tersor: 1
                 seed: 0
                 steps: [prune: {keep: 0.1}, entropy]
command line     prune keep=0.1 entropy
Python           Recipe([Prune(keep=0.1), Entropy()])
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import yaml

from tersor.core.recipe import NUMBER, Recipe
from tersor.core.state import State
from tersor.errors import RefusedError, SettingError, did_you_mean
from tersor.settings import make

MOST = 100_000  # values of a recipe
NESTED = 100  # brackets of a recipe that are open at one place
KEYS = ("tersor", "seed", "zeros", "steps", "base", "result")  # base and result are in lock files


def dump(document: Mapping[str, Any]) -> str:
    """YAML with one step a line, for people."""
    return yaml.safe_dump(dict(document), sort_keys=False, default_flow_style=None, width=110)


class Loader(yaml.SafeLoader):
    """YAML 1.1 without its numbers of base 60: the pattern 2:4 is text."""

    def number(self, node: yaml.ScalarNode) -> int | float | str:
        if ":" in node.value:
            return str(node.value)
        is_int = node.tag.endswith("int")
        return self.construct_yaml_int(node) if is_int else self.construct_yaml_float(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping. A key that occurs twice is an error, and not overridden."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if double := [key for n, key in enumerate(keys) if key in keys[:n]]:
            raise yaml.constructor.ConstructorError(
                None, None, f"{double[0]!r} is given twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


for _tag in ("int", "float"):
    Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", Loader.number)


def open_brackets(text: str) -> int:
    """The most brackets that are open at one place; those in strings count too."""
    steps = (1 if letter in "[{" else -1 for letter in re.findall(r"[\[\]{}]", text))
    return max(accumulate(steps), default=0)


def too_large(document: Any) -> bool:
    """Whether a document has too many values, or itself inside. A short text may stand for billions: its
    aliases may have aliases inside."""
    left, waiting = MOST, [document]
    while waiting and left > 0:
        value = waiting.pop()
        left -= 1
        if isinstance(value, (dict, list)):
            waiting += value.values() if isinstance(value, dict) else value
    return bool(waiting)


def from_yaml(text: str, table: Mapping[str, type], name: str = "recipe") -> Recipe:
    """Read a recipe. `name`: its name in errors."""
    if open_brackets(text) > NESTED:  # PyYAML takes the square of their number
        raise SettingError(f"{name}: more than {NESTED} brackets are open at one place")
    try:
        document = yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError, TypeError, LookupError, RecursionError) as error:  # PyYAML's own, too
        raise SettingError(f"{name} is not YAML: {' '.join(str(error).split())}") from None
    if too_large(document):
        raise SettingError(f"{name}: it has more than {MOST:,} values, aliases counted each time")
    if not isinstance(document, dict):
        raise SettingError(f"{name}: expected a mapping with 'steps', found {type(document).__name__}")
    for key in document:
        if key not in KEYS:
            raise SettingError(f"{name}: no key {key!r}; {did_you_mean(key, KEYS)}")
    number = document.get("tersor", NUMBER)
    if number != NUMBER:
        raise SettingError(
            f"{name} has format {number!r}; this version reads {NUMBER}. A newer tersor may read it."
        )
    items = document.get("steps")
    if not isinstance(items, list):
        raise SettingError(
            f"{name}: 'steps' must be a list of steps, such as [prune: {{keep: 0.5}}, entropy]"
        )
    steps = []
    for item in items:
        if isinstance(item, str):
            item = {item: {}}
        if not isinstance(item, dict) or len(item) != 1:
            raise SettingError(f"{name}: a step is one word with its settings, not {item!r}")
        ((word, settings),) = item.items()
        if settings is not None and not isinstance(settings, dict):
            raise SettingError(f"{name}: {word}: settings must be a mapping, not {settings!r}")
        steps.append(make(step_class(word, table), settings or {}))
    base, result = document.get("base"), document.get("result") or {}
    if not isinstance(base, str | None):
        raise SettingError(f"{name}: 'base' must be a digest, not {base!r}")
    if not isinstance(result, dict) or not all(isinstance(digest, str) for digest in result.values()):
        raise SettingError(f"{name}: 'result' must be digests by site, not {str(result)[:40]}")
    seed, zeros = (
        tuple(value) if isinstance(value := document.get(key, usual), list) else value
        for key, usual in (("seed", 0), ("zeros", "*"))
    )
    return Recipe(tuple(steps), seed, base, tuple(result.items()), zeros)


def from_words(words: Sequence[str], table: Mapping[str, type], seed: int = 0) -> Recipe:
    """Read `prune keep=0.5 quantize bits=8`: a word starts a step, key=value belongs to the step before
    it."""
    steps: list[tuple[Any, dict[str, Any]]] = []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            steps.append((step_class(word, table), {}))
        elif not steps:
            raise SettingError(
                f"{word!r} comes before any step; begin with one of {', '.join(sorted(table))}"
            )
        elif key in steps[-1][1]:
            raise SettingError(f"{steps[-1][0].name}: {key} is given twice; leave out one of the two")
        else:
            steps[-1][1][key] = value
    return Recipe(tuple(make(kind, settings) for kind, settings in steps), seed)


def step_class(word: str, table: Mapping[str, type]) -> type:
    if word == "trained":
        raise SettingError(
            "recipe: 'trained' was a user's own training loop, which a recipe cannot hold. Run the steps "
            "before it, train, and run the steps after it on the result"
        )
    if word not in table:
        raise SettingError(f"recipe: no step {word!r}; {did_you_mean(word, table)}")
    return table[word]


def lock(state: State) -> dict[str, Any]:
    """The lock file: the recipe with every setting, the base digest, and the digest of each changed site."""
    if state.ledger.past:
        raise RefusedError(
            "lock: this ledger no longer has the settings of its oldest steps, since a file keeps only some"
        )
    touched = {entry.site for entry in state.ledger.entries if entry.changes}
    touched |= {name for name, site in state.sites.items() if site.origin}
    return {
        **state.ledger.recipe,
        "base": state.ledger.base,
        "result": {name: form.digest for name, form in state.forms.items() if name in touched},
    }
