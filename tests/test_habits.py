"""Habits that are not allowed in the source: assert, broad except, mutable defaults, leftovers, prints."""

import ast
import re
from collections.abc import Iterator

import pytest
from source_tree import Rule, Tree, fake, findings

PRINTERS = {"cli", "report"}

# Modules that may catch everything, with the reason. They must raise it again or pass it to a future.
BROAD_AND_RAISED: dict[str, str] = {
    "tersor.model.graph": "torch.export raises whatever the model or it likes; it is refused with its text",
    "tersor.model.import_object": "runs the user's own file, which may raise anything; reported as theirs",
    "tersor.boundary": "makes an error of ours from any that is not the user's",
    "tersor.model.changed_copy": "copies the user's modules, which may raise anything; refused with its text",
    "tersor.io.pool": "does a job in a thread's place; its error is raised when its turn comes",
}


def asserts(tree: Tree) -> Iterator[str]:
    """Under -O an assert is removed, and its message does not help users."""
    for module in tree.values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Assert):
                yield module.at(node, "assert; raise an error of errors.py that says what to do")


BROAD = {"Exception", "BaseException"}


def names_in(node: ast.expr | None) -> set[str]:
    """The last words of a name or of a tuple of names: {"OSError"} for builtins.OSError."""
    parts = node.elts if isinstance(node, ast.Tuple) else [node] if node else []
    return {ast.unparse(part).split(".")[-1] for part in parts}


def handed_on(last: ast.stmt) -> bool:
    """Whether a statement gives the error to a future."""
    call = last.value if isinstance(last, ast.Expr) else None
    return isinstance(call, ast.Call) and names_in(call.func) == {"set_exception"}


def broad_excepts(tree: Tree) -> Iterator[str]:
    for module in tree.values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ExceptHandler) and (node.type is None or names_in(node.type) & BROAD):
                raised = isinstance(node.body[-1], ast.Raise) or handed_on(node.body[-1])
                if not (raised and module.name in BROAD_AND_RAISED):
                    yield module.at(node, "broad except; name the errors that are expected")
            suppress = node.args if isinstance(node, ast.Call) and names_in(node.func) == {"suppress"} else []
            if any(names_in(arg) & BROAD for arg in suppress):
                yield module.at(node, "broad suppress; name the errors that are expected")


MUTABLE = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
MAKERS = {"list", "dict", "set", "bytearray", "defaultdict", "OrderedDict", "Counter", "deque"}


def mutable_defaults(tree: Tree) -> Iterator[str]:
    for module in tree.values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                for default in (*node.args.defaults, *node.args.kw_defaults):
                    made = isinstance(default, ast.Call) and names_in(default.func) & MAKERS
                    if made or isinstance(default, MUTABLE):
                        yield module.at(default, f"mutable default {ast.unparse(default)}")


def leftovers(tree: Tree) -> Iterator[str]:
    for module in tree.values():
        for number, line in enumerate(module.text.splitlines(), 1):
            if found := re.search(r"\b(TODO|FIXME|XXX)\b", line):
                yield f"{module.path}:{number}: {found[0]}; finish it, or file it as an issue"


def prints(tree: Tree) -> Iterator[str]:
    """Only the outermost layer prints; the rest returns, yields or raises."""
    for module in tree.values():
        for node in ast.walk(module.tree):
            called = (
                isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
            )
            if called and module.folder not in PRINTERS:
                yield module.at(node, f"print() outside {' and '.join(sorted(PRINTERS))}")


def silent_modules(tree: Tree) -> Iterator[str]:
    """Modules without a docstring, except an __init__ that holds nothing but constants."""
    for module in tree.values():
        bare = module.is_package and all(
            isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant | ast.List)
            for node in module.tree.body
        )
        if not bare and not (ast.get_docstring(module.tree) or "").strip():
            yield f"{module.path}: no docstring: open with the idea, the source, the cost"


def columns(line: str) -> set[int]:
    """The columns at which cells of a table's line begin, and that of an equals sign, for sums."""
    return {match.end() for match in re.finditer(r"  +(?=\S)", line)} | {line.find("=")}


def headers(tree: Tree) -> Iterator[str]:
    """A module's docstring opens with its name, in one sentence on one line. A continuation line in a table
    is indented to its cell; formatters and quick edits often move it to the left."""
    for module in tree.values():
        text = ast.get_docstring(module.tree)
        name = module.name.split(".")[-1]
        if not text or module.is_package or name == "__main__":
            continue
        first, *rest = text.splitlines()
        if not plain(first).startswith(plain(name).removesuffix("s")):
            yield f"{module.path}:1: it opens with {first[:30]!r}, and not with its name"
        if not first.endswith((".", "?", ":")) or (rest and rest[0].strip()):
            yield f"{module.path}:1: its first line is no sentence of its own: {first[-40:]!r}"
        yield from (
            f"{module.path}:{at}: {line.strip()[:40]!r} is not under a cell" for at, line in adrift(rest)
        )


def plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def adrift(lines: list[str]) -> Iterator[tuple[int, str]]:
    """Indented lines that are under no cell of the previous line or of the last line without indent."""
    head = before = ""
    for at, line in enumerate(lines, 2):
        indent = len(line) - len(line.lstrip())
        if line.strip() and indent and head:
            cells = columns(head) | columns(before) | {len(before) - len(before.lstrip())}
            if indent not in cells and not before.endswith(":"):
                yield at, line
        elif not indent:
            head = line
        before = line


RULES: tuple[Rule, ...] = (
    asserts,
    broad_excepts,
    mutable_defaults,
    leftovers,
    prints,
    silent_modules,
    headers,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_source_has_none(rule: Rule) -> None:
    found = findings(rule)
    assert not found, f"\n{found}"


# Each bad example: the rule, a file, its text, a part of the finding. Each is found exactly once.
BAD: list[tuple[Rule, str, str, str]] = [
    (asserts, "io/a.py", "def f(x):\n    assert x", "a.py:2"),
    (broad_excepts, "io/a.py", "try:\n    f()\nexcept:\n    pass", "a.py:3"),
    (broad_excepts, "io/a.py", "try:\n    f()\nexcept Exception as e:\n    g(e)", "broad except"),
    (broad_excepts, "io/a.py", "try:\n    f()\nexcept (OSError, BaseException):\n    pass", "broad except"),
    (broad_excepts, "io/pool.py", "try:\n    f()\nexcept BaseException as e:\n    log(e)", "broad except"),
    (
        broad_excepts,
        "model/import_object.py",
        "try:\n    f()\nexcept Exception:\n    pass",
        "import_object.py:3",
    ),
    (broad_excepts, "io/a.py", "with contextlib.suppress(Exception):\n    f()", "broad suppress"),
    (mutable_defaults, "io/a.py", "def f(x=[]): pass", "mutable default []"),
    (mutable_defaults, "io/a.py", "def f(*, x=dict(a=1)): pass", "mutable default dict(a=1)"),
    (mutable_defaults, "io/a.py", "f = lambda x={}: x", "mutable default {}"),
    (leftovers, "io/a.py", "x = 1  # TO" + "DO later", "a.py:1"),
    (leftovers, "io/a.py", '"""FIX' + 'ME"""', "a.py:1"),
    (prints, "io/a.py", "def f():\n    print(1)", "a.py:2"),
    (silent_modules, "io/a.py", "x = 1", "io/a.py"),
    (silent_modules, "io/a.py", '"""  """', "io/a.py"),
    (silent_modules, "io/__init__.py", "from tersor.io.a import b", "io/__init__.py"),
    (headers, "io/a_b.py", '"""C: d."""', "opens with 'C: d.'"),
    (headers, "io/a.py", '"""A: b,\nc."""', "no sentence of its own"),
    (headers, "io/a.py", '"""A.\n\nx = y      z\n    w\n"""', "a.py:4: 'w' is not under a cell"),
]


@pytest.mark.parametrize(("rule", "path", "text", "says"), BAD)
def test_bad_source_is_caught(rule: Rule, path: str, text: str, says: str) -> None:
    found = list(rule(fake({path: text})))
    assert len(found) == 1
    assert says in found[0]


def test_every_rule_has_a_bad_example() -> None:
    assert {rule for rule, *_ in BAD} == set(RULES)


# Allowed code that looks like the bad examples.
GOOD = {
    "io/tables.py": '"""Tables: two.\n\nx    y\n     z\n\nloss = a\n     + b\n"""',
    "io/a.py": "try:\n    f()\nexcept (OSError, ValueError):\n    pass\nwith suppress(OSError):\n    f()",
    "io/b.py": "def f(x=(), y=None, z=frozenset()): pass",
    "io/c.py": "log.print_exc()\npprint(1)\nconsole.print(1)\nmastodon = 'todo'",
    "model/import_object.py": "try:\n    f()\nexcept Exception as e:\n    raise TaskError(str(e)) from e",
    "report/a.py": "print(1)",
    "cli.py": "print(1)",
}


@pytest.mark.parametrize("path", GOOD)
def test_good_source_is_left_alone(path: str) -> None:
    name = path.rsplit("/", 1)[-1].removesuffix(".py")
    text = f'"""{name}."""\n{GOOD[path]}'
    tree = fake({path: text, "io/__init__.py": "", "__init__.py": "__version__ = '1'"})
    assert [finding for rule in RULES for finding in rule(tree)] == []
