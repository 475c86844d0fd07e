"""The structure of the source: imports go one way, files are short, and `import tersor` is fast."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from source_tree import ROOT, Module, Rule, Tree, fake, findings

# A folder (or file) of src/tersor imports from the lines above its own, never from its own line or below.
# "tersor" is tersor/__init__.py with the public names.
LEVELS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    (
        "files",
        "settings",
        "setting_effects",
        "threads",
        "dtypes",
        "compiled",
        "boundary",
    ),  # files whole or not; settings; pools; what dtypes do; loops that numba compiles; errors that leave
    ("coders", "maths"),
    ("forms",),
    ("encode",),  # forms only decode
    ("model",),
    ("zoo",),  # architectures and their tasks
    ("runtimes", "measure"),  # below the steps: measuring and exporting are steps too
    ("record",),  # what happened, and how it is kept: events, ledger, journal
    ("core",),
    ("steps",),
    ("io", "report"),
    ("standin",),  # a small model for dry runs
    (
        "resolve",
        "pipeline",
        "check",
    ),  # words to a model and a recipe, these to a folder of results
    ("described",),  # what a file or folder holds
    ("candidates",),  # files and models to export, score and compare
    ("search",),  # recipes that are tried, the best within a budget
    ("exits", "options"),  # how a command ends; words that commands share
    ("tersor",),
    ("commands",),
    ("cli", "demo", "__main__"),
)

# The exceptions within a line: who may import whom.
SIDEWAYS: dict[str, set[str]] = {
    "settings": {"dtypes"},  # a setting that is a module is the bytes of its tensors
    "runtimes": {"measure"},  # a runtime is timed the way everything else is
    "report": {"measure"},  # a report shows what was measured
    "cli": {"demo"},
    "__main__": {"cli"},
}

LINES_A_FILE = 350
# An hour of reading: cuts, proofs, chained runs and trials came to it; what happened and the encode side went
# to rooms of their own. Zeros that came with a model are made masks by the executor, which took 20 more;
# one line begins to compile what steps will need. Steps that cut, refit and train in turn see the state after
# their own groups (View.after), and learn which were refused: 48 more. Grids whose range moves, forms that
# say what decoding costs before it is done, and fields of a class looked up once: 30 more. A part of a model
# that is traced in its place, and proved there: 45 more. How many samples a moment is of: 6 more.
LINES_OF_THE_HEART = 2116

# Packages that only some calls need: a plain import of tersor must not load them.
HEAVY = {
    "accelerate", "matplotlib", "numba", "onnx", "onnxruntime", "onnxscript", "openvino", "rich", "sklearn",
    "typer",
}  # fmt: skip


class Import(NamedTuple):
    target: str
    line: int
    late: bool  # inside a function: runs when it is called
    typing: bool  # under TYPE_CHECKING: never runs


def targets(module: Module, node: ast.AST, known: Tree) -> list[str]:
    """The modules of our own that one statement (or importlib call) imports."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            above = module.name.split(".")
            above = above[: len(above) - node.level + module.is_package]
            base = ".".join([*above, base] if base else above)
        # "from tersor.forms import dense" imports the module dense if there is one, else a name from forms.
        full = [f"{base}.{alias.name}" for alias in node.names]
        names = [name if name in known else base for name in full]
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
        names = [a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    else:
        names = []
    return [name for name in dict.fromkeys(names) if name.split(".")[0] == "tersor"]


def imports(module: Module, known: Tree) -> Iterator[Import]:
    def walk(node: ast.AST, late: bool, typing: bool) -> Iterator[Import]:
        for target in targets(module, node, known):
            yield Import(target, getattr(node, "lineno", 1), late, typing)
        late = late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for child in node.body:
                yield from walk(child, late, True)
            for child in node.orelse:
                yield from walk(child, late, typing)
            return
        for child in ast.iter_child_nodes(node):
            yield from walk(child, late, typing)

    yield from walk(module.tree, False, False)


def level(folder: str) -> int | None:
    return next((i for i, line in enumerate(LEVELS) if folder in line), None)


def folder_of(target: str) -> str:
    return target.split(".")[1] if "." in target else target


def wrong_way(tree: Tree) -> Iterator[str]:
    """Imports against the order, anywhere in a file, whether or not they run."""
    for module in tree.values():
        mine = level(module.folder)
        if mine is None:
            yield f"{module.path}: {module.folder} has no place in LEVELS of tests/test_layering.py yet"
            continue
        for item in imports(module, tree):
            other = folder_of(item.target)
            theirs = level(other)
            allowed = (
                other == module.folder
                or (theirs is not None and theirs < mine)
                or other in SIDEWAYS.get(module.folder, ())
            )
            if not allowed:
                yield f"{module.path}:{item.line}: {module.folder} may not import {other} ({item.target})"


def cycles(tree: Tree) -> Iterator[str]:
    """Cycles of modules that import each other, type-only imports included, since readers follow these
    too."""
    graph = {module.name: {item.target for item in imports(module, tree)} for module in tree.values()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        yield "import cycle: " + " -> ".join(reversed(error.args[1]))


def long_files(tree: Tree) -> Iterator[str]:
    for module in tree.values():
        lines = len(module.text.splitlines())
        if lines > LINES_A_FILE:
            yield f"{module.path}: {lines} lines, and {LINES_A_FILE} are allowed: look for the seam"


def big_heart(tree: Tree) -> Iterator[str]:
    lines = sum(len(m.text.splitlines()) for m in tree.values() if m.folder in ("forms", "core"))
    if lines > LINES_OF_THE_HEART:
        yield f"tersor: forms and core have {lines} lines together, and {LINES_OF_THE_HEART} are allowed"


RULES: tuple[Rule, ...] = (wrong_way, cycles, long_files, big_heart)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_source_keeps(rule: Rule) -> None:
    found = findings(rule)
    assert not found, f"\n{found}"


# Each bad example: the rule, the files, a part of the finding. Each is found exactly once.
BAD: list[tuple[Rule, dict[str, str], str]] = [
    (wrong_way, {"forms/a.py": "from tersor.core import run"}, "forms may not import core"),
    (wrong_way, {"forms/a.py": "import tersor.core.run as r"}, "forms may not import core"),
    (wrong_way, {"forms/a.py": "from ..core.run import run"}, "a.py:1: forms may not import core"),
    (wrong_way, {"forms/__init__.py": "from ..core import run"}, "forms may not import core"),
    (wrong_way, {"forms/a.py": "from .. import core", "core/__init__.py": ""}, "may not import core"),
    (wrong_way, {"forms/a.py": "def f():\n    from tersor.core import run"}, "a.py:2: forms may not"),
    (wrong_way, {"forms/a.py": "if TYPE_CHECKING:\n    import tersor.core"}, "forms may not import core"),
    (wrong_way, {"core/a.py": "def f():\n    import tersor.steps"}, "core may not import steps"),
    (wrong_way, {"maths/a.py": "from importlib import *\nimport_module('tersor.forms')"}, "maths may not"),
    (wrong_way, {"maths/a.py": "from tersor.coders import huffman"}, "maths may not import coders"),
    (wrong_way, {"measure/a.py": "from tersor.report import table"}, "measure may not import report"),
    (wrong_way, {"io/a.py": "from tersor import __version__"}, "io may not import tersor"),
    (wrong_way, {"__init__.py": "from tersor.cli import main"}, "tersor may not import cli"),
    (wrong_way, {"runtimes/ort.py": "from tersor.steps import Export"}, "runtimes may not import steps"),
    (wrong_way, {"steps/prune.py": "def f():\n    import tersor.io"}, "steps may not import io"),
    (wrong_way, {"novelty/a.py": ""}, "novelty has no place in LEVELS"),
    (wrong_way, {"core/a.py": "import tersor.novelty"}, "core may not import novelty"),
    (cycles, {"core/a.py": "import tersor.core.b", "core/b.py": "from .a import x"}, "core.a"),
    (cycles, {"core/a.py": "import tersor.core.b", "core/b.py": "def f():\n    from . import a"}, "core.b"),
    (
        cycles,
        {"core/a.py": "if TYPE_CHECKING:\n    from .b import B", "core/b.py": "from .a import A"},
        "core.a",
    ),
    (cycles, {"forms/__init__.py": "from .a import A", "forms/a.py": "from tersor.forms import B"}, "forms"),
    (long_files, {"io/a.py": '"""A."""\n' * 351}, "351 lines"),
    (big_heart, {f"{d}/{n}.py": "x = 1\n" * 353 for d in ("forms", "core") for n in "abc"}, "2118"),
]


@pytest.mark.parametrize(("rule", "files", "says"), BAD)
def test_bad_source_is_caught(rule: Rule, files: dict[str, str], says: str) -> None:
    found = list(rule(fake(files)))
    assert len(found) == 1
    assert says in found[0]


def test_every_rule_has_a_bad_example() -> None:
    assert {rule for rule, _, _ in BAD} == set(RULES)


# Allowed code that looks like the bad examples.
GOOD: list[dict[str, str]] = [
    {"core/a.py": "from tersor.forms import Dense\nfrom .b import c\nimport torch", "core/b.py": "c = 1"},
    {"report/a.py": "from tersor.measure import nbytes"},
    {"steps/export.py": "from tersor.runtimes import ort"},
    {"cli.py": "from tersor import run\nprint(run)", "__main__.py": "from tersor.cli import main"},
    {"forms/__init__.py": "from .a import A", "forms/a.py": "from .b import B", "forms/b.py": "B = 1"},
    {"io/a.py": "x = 1\n" * 350},
]


@pytest.mark.parametrize("files", GOOD)
def test_good_source_is_left_alone(files: dict[str, str]) -> None:
    assert [finding for rule in RULES for finding in rule(fake(files))] == []


def loaded(statement: str, packages: set[str]) -> list[str]:
    """Which of these packages a fresh interpreter has loaded after one statement."""
    code = f"{statement}\nimport sys\nprint(*sorted(set(sys.modules) & {packages!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_import_is_light() -> None:
    assert loaded("import tersor", HEAVY) == []


def test_steps_and_files_load_scipy_and_numba_when_they_use_them() -> None:
    """Beside torch they would be most of the time of `tersor steps`."""
    assert loaded("import tersor.steps, tersor.report.steps_table", {"scipy", "numba", "jinja2"}) == []


def test_a_heavy_import_would_be_seen() -> None:
    assert loaded("import tersor, rich", HEAVY) == ["rich"]


def test_the_second_reader_stands_alone() -> None:
    """reference/ checks docs/format.md only if it shares no code with the first reader."""
    for path in sorted((ROOT / "reference").rglob("*.py")):
        module = Module(path.stem, str(path.relative_to(ROOT)), path.read_text(), False)
        assert not [module.at(node, "") for node in ast.walk(module.tree) if borrowed(node)]


def test_the_second_reader_has_no_circle() -> None:
    """Cycles through late imports are found too."""
    paths = {path.stem: path for path in (ROOT / "reference").glob("*.py")}
    needs = {name: asked(path.read_text()) & paths.keys() for name, path in paths.items()}
    list(graphlib.TopologicalSorter(needs).static_order())  # CycleError names a circle
    assert needs["streams"] >= {"static", "mixing", "predictive"}


def asked(source: str) -> set[str]:
    """The modules that a file imports, anywhere in it."""
    nodes = list(ast.walk(ast.parse(source)))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}


def borrowed(node: ast.AST) -> bool:
    names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
    names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
    return any(name.split(".")[0] in ("tersor", "torch", "safetensors", "numba") for name in names)


def test_a_borrowing_second_reader_would_be_seen() -> None:
    for bad in ("import tersor.io", "from tersor.io import read", "import numpy, torch"):
        assert borrowed(ast.parse(bad).body[0])
    assert not borrowed(ast.parse("import numpy as np").body[0])
