"""The source as parsed files, for the tests that read it: test_layering.py and test_habits.py.

A rule is a function from parsed files to findings, "where: what". Each is run on src/tersor, where it must
find nothing, and on small bad examples, where it must find exactly that.
"""

import ast
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Module:
    name: str  # "tersor.forms.dense"; a package goes by its folder's name
    path: str
    text: str
    is_package: bool

    @functools.cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @property
    def folder(self) -> str:
        parts = self.name.split(".")
        return parts[1] if len(parts) > 1 else parts[0]

    def at(self, node: ast.AST, what: str) -> str:
        return f"{self.path}:{getattr(node, 'lineno', 1)}: {what}"


Tree = Mapping[str, Module]
Rule = Callable[[Tree], Iterator[str]]


def parse(files: Mapping[str, str]) -> dict[str, Module]:
    """Modules by name from texts by path, as "tersor/forms/dense.py"."""
    modules = {}
    for path, text in files.items():
        parts = path.removesuffix(".py").split("/")
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        modules[name] = Module(name, path, text, is_package)
    return modules


@functools.cache
def source() -> Tree:
    src = ROOT / "src"
    return parse({str(p.relative_to(src)): p.read_text() for p in sorted((src / "tersor").rglob("*.py"))})


def fake(files: Mapping[str, str]) -> dict[str, Module]:
    """Example files by their path below tersor/."""
    return parse({f"tersor/{path}": text for path, text in files.items()})


def findings(rule: Rule) -> str:
    """What a rule finds in src/tersor, one finding a line."""
    if len(source()) <= 10:
        raise LookupError(f"no source in {ROOT / 'src'}: the rules would hold for nothing")
    return "\n".join(rule(source()))
