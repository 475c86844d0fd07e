"""The command line: words to calls, results to stdout, talk to stderr. No logic lives here.

exit 0  done      1  understood and refused (errors.py)      2  cannot be meant: a misspelt word or setting
     130  stopped by Ctrl-C      141  the reader of the output has gone, such as head
With --json stdout is one JSON document, also for an error: {"error": text, "kind": class}.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from tersor.errors import TersorError

app = typer.Typer(
    name="tersor", help="Terse tensors: compress trained PyTorch models, with measured proof.",
    add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
)  # fmt: skip
STOPPED, UNREAD = 130, 141  # by Ctrl-C, by a reader that is gone: as shells have it
UsageError: Any = typer.BadParameter.__mro__[1]  # wherever this version of typer keeps it

MODEL = "file.py:factory, package.module:factory, torchvision:NAME, or FILE.tersor with --arch"
Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL)]
Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="[STEP KEY=VALUE ...]", help="a recipe in words: prune keep=0.1 entropy"),
]
File = Annotated[Path, typer.Argument(metavar="FILE", help="a .tersor file")]
Weights = Annotated[
    str | None, typer.Option("--weights", metavar="FILE", help=".safetensors, or a saved state dict")
]
Key = Annotated[
    str | None,
    typer.Option("--key", metavar="KEY", help="of several networks in a checkpoint the one under this key"),
]
Arch = Annotated[
    str | None, typer.Option("--arch", metavar="FILE.py:NAME", help="the code that FILE.tersor is for")
]
Base = Annotated[
    str | None, typer.Option("--base", metavar="FILE", help="the weights that FILE.tersor began with")
]
Folder = Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="folder of the results")]
Tiny = Annotated[
    bool, typer.Option("--tiny", help="the short header, for files of a few kB: no ledger, one checksum")
]
Workers = Annotated[
    int | None, typer.Option("--workers", metavar="N", help="threads; left out: one for each core")
]
Json = Annotated[bool, typer.Option("--json", help="one JSON document on stdout, and nothing else there")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress on stderr")]


@dataclass(frozen=True)
class Answer:
    """What a command found, and how to show it to people."""

    facts: dict[str, Any]
    json: bool
    tables: Callable[[Any], Iterable[Any]]
    code: int = 0

    def deliver(self) -> int:
        """Print it on stdout; the exit code."""
        from tersor.report.console import show, show_json

        if self.json:
            show_json(self.facts)
        else:
            show(self.tables(self.facts))
        return self.code


@app.command()
def demo(out: Folder = Path("out/demo"), json: Json = False, quiet: Quiet = False) -> Answer:
    """Train and compress a small net on real data."""
    from tersor.demo import demo as whole
    from tersor.demo import report
    from tersor.report.progress import watching

    with watching(quiet=quiet, plain=json) as observer:
        facts = whole(out, observer)
    return Answer(facts, json, report)


@app.command()
def run(
    model: Model,
    words: Words = None,
    *,
    out: Folder,
    task: Annotated[
        str | None,
        typer.Option("--task", metavar="TASK", help="digits, fashion-mnist:FOLDER or file.py:function"),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", metavar="FILE", help="recipe.yaml, or a lock file")
    ] = None,
    weights: Weights = None,
    key: Key = None,
    arch: Arch = None,
    base: Base = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in DIR/journal")] = False,
    force: Annotated[bool, typer.Option("--force", help="run anew in a folder with a finished run")] = False,
    keep_journal: Annotated[
        bool, typer.Option("--keep-journal", help="DIR/journal stays, for undo and replay of single steps")
    ] = False,
    seed: Annotated[int | None, typer.Option("--seed", metavar="N", help="not the recipe's own")] = None,
    export: Annotated[bool, typer.Option("--export", help="also write DIR/model.onnx")] = False,
    tiny: Tiny = False,
    json: Json = False,
    quiet: Quiet = False,
) -> Answer:
    """Compress a model by a recipe, into a folder."""
    from tersor.given import given_files, given_model, given_recipe
    from tersor.job import job
    from tersor.model.tasks import task_from
    from tersor.report.progress import watching
    from tersor.report.table import report

    steps = given_recipe(recipe, words, seed=seed)
    data = None if task is None else task_from(task)
    given = given_model(model, weights=weights, key=key, arch=arch, base=base)
    with watching(quiet=quiet, plain=json) as observer:
        _, facts = job(
            given, steps, data, out, resume=resume, force=force, keep_journal=keep_journal, export=export,
            tiny=tiny, observer=observer, inputs=given_files(model, weights, arch, base, recipe, task),
        )  # fmt: skip
    return Answer(facts, json, report)


@app.command()
def check(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="recipe.yaml")],
    model: Annotated[
        str | None, typer.Option("--model", metavar="MODEL", help=f"also name the weights meant: {MODEL}")
    ] = None,
    *,
    weights: Weights = None,
    key: Key = None,
    arch: Arch = None,
    json: Json = False,
) -> Answer:
    """Say what a recipe does, needs and gives up."""
    from tersor.check import check as examine
    from tersor.given import given_model, given_recipe
    from tersor.report.check import lines

    steps = given_recipe(recipe, None)
    given = None if model is None else given_model(model, weights=weights, key=key, arch=arch)
    return Answer(
        {"recipe": str(recipe), "digest": steps.digest, "steps": examine(steps, given)}, json, lines
    )


@app.command()
def show(
    file: File,
    site: Annotated[
        str | None, typer.Argument(metavar="[SITE]", help="a name or a glob: conv1.weight, 'conv*'")
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="OUT.html", help="also draw where the bytes are, in a page"),
    ] = None,
    json: Json = False,
) -> Answer:
    """Show forms, bytes and history of a file."""
    from tersor.io import load
    from tersor.report.html import write
    from tersor.report.show import shown, tables

    facts = shown(load(file), file, site)
    if html is not None:
        facts["html"] = write(facts, html, file)
    return Answer(facts, json, tables)


@app.command()
def pack(
    weights: Annotated[
        Path, typer.Argument(metavar="WEIGHTS", help=".safetensors, a saved state dict, a checkpoint folder")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="the .tersor file to write")],
    words: Words = None,
    *,
    key: Key = None,
    max_drop: Annotated[
        float | None,
        typer.Option("--max-drop", metavar="POINTS", help="round, and lose no more of the task's metric"),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="MODEL", help="for --max-drop: the weights' code")
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", metavar="TASK", help="for --max-drop: what is measured")
    ] = None,
    tiny: Tiny = False,
    workers: Workers = None,
    json: Json = False,
    quiet: Quiet = False,
) -> Answer:
    """Compress weights, losslessly unless told more."""
    from tersor import io
    from tersor.given import given_files, given_recipe, given_rounding
    from tersor.job import rounded
    from tersor.report.files import packed, packed_lines, rounded_lines, sizes
    from tersor.report.progress import watching

    rounding = given_rounding(weights, max_drop, model, task, words, key=key)
    with watching(quiet=quiet, plain=json) as observer:
        if rounding is not None:
            inputs = given_files(weights, model, task)
            facts = rounded(
                *rounding, out, max_drop=max_drop or 0.0, tiny=tiny, observer=observer, inputs=inputs
            )
            # The file may hold more than the model took of it.
            found = sizes(weights, out, rounding[0].given_nbytes)
            return Answer(found | facts, json, rounded_lines)
        observer.step(1, 1, "pack")
        recipe = given_recipe(None, words or ["entropy"])
        done = io.pack(weights, out, recipe, key=key, tiny=tiny, workers=workers, observer=observer)
    return Answer(packed(weights, out, done), json, packed_lines)


@app.command()
def unpack(
    file: File,
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", metavar="WEIGHTS", help="the .safetensors file to write, or a new folder"
        ),
    ],
    *,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="GLOB", help="only these tensors; the others are not read"),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option("--shard", metavar="SIZE", help="a folder of files of so much each: 2GB"),
    ] = None,
    workers: Workers = None,
    json: Json = False,
    quiet: Quiet = False,
) -> Answer:
    """Write a file's weights, decoded, as safetensors."""
    from tersor import io
    from tersor.report.files import sizes, unpacked_lines
    from tersor.report.progress import watching

    with watching(quiet=quiet, plain=json) as observer:
        observer.step(1, 1, "unpack")
        io.unpack(file, out, only=only or "*", shard=shard, workers=workers, observer=observer)
    facts = sizes(file, out) | {"only": only or []}
    if only:
        del facts["share"]
    return Answer(facts, json, unpacked_lines)


OLD = "a .tersor file, .safetensors, a saved state dict or a checkpoint folder"


@app.command()
def diff(
    old: Annotated[Path, typer.Argument(metavar="OLD", help=OLD)],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="what it became, of any of these kinds")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="PATCH", help="the patch to write")],
    *,
    json: Json = False,
    quiet: Quiet = False,
) -> Answer:
    """Write what changed from one file to the next."""
    from tersor import io
    from tersor.report.files import told, told_lines
    from tersor.report.progress import watching

    with watching(quiet=quiet, plain=json) as observer:
        observer.step(1, 1, "diff")
        done = io.diff(old, new, out, observer=observer)
    return Answer(told(old, new, out, done), json, told_lines)


@app.command()
def patch(
    old: Annotated[Path, typer.Argument(metavar="OLD", help="the file that diff was given")],
    changes: Annotated[Path, typer.Argument(metavar="PATCH", help="what diff wrote")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="NEW", help="the file to write")],
    *,
    json: Json = False,
    quiet: Quiet = False,
) -> Answer:
    """Make the next file of the earlier one and a patch."""
    from tersor import io
    from tersor.report.files import patched, patched_lines
    from tersor.report.progress import watching

    with watching(quiet=quiet, plain=json) as observer:
        observer.step(1, 1, "patch")
        io.patch(old, changes, out, observer=observer)
    return Answer(patched(old, changes, out), json, patched_lines)


@app.command()
def verify(file: File, workers: Workers = None, json: Json = False) -> Answer:
    """Check every part of a file."""
    from tersor import io
    from tersor.report.files import verified, verified_lines

    facts = verified(file, io.verify(file, workers=workers))
    return Answer(facts, json, verified_lines, code=0 if facts["sound"] else 1)


@app.callback(invoke_without_command=True)
def about(
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    """Terse tensors: compress trained PyTorch models, with measured proof."""
    if version:
        from tersor import __version__

        print(f"tersor {__version__}")


def main() -> int:
    """Run the words of sys.argv; returns the exit code."""
    try:
        code = answered()
        sys.stdout.flush()  # or what is left is written when Python ends, and an error told then
        return code
    except (BrokenPipeError, SystemExit) as error:  # typer makes the one into the other
        if not isinstance(error, BrokenPipeError) and not isinstance(error.__context__, BrokenPipeError):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNREAD


def answered() -> int:
    words = sys.argv[1:] or ["--help"]
    try:
        # What a user's own file prints must not get into the document.
        with redirect_stdout(sys.stderr) if "--json" in words else nullcontext():
            answer = app(words, prog_name="tersor", standalone_mode=False)
    except TersorError as error:
        return refuse(str(error), type(error).__name__, error.exit_code, words)
    except UsageError as error:
        path = error.ctx.command_path if error.ctx is not None else "tersor"
        return refuse(f"{error.format_message().rstrip('.')}. See: {path} --help", "UsageError", 2, words)
    except (KeyboardInterrupt, typer.Abort):
        answer = STOPPED
    if answer == STOPPED:
        return refuse("stopped; a run goes on with --resume", "KeyboardInterrupt", STOPPED, words)
    return answer.deliver() if isinstance(answer, Answer) else 0


def refuse(text: str, kind: str, code: int, words: list[str]) -> int:
    from tersor.report.console import show_json, talk

    if "--json" in words:
        show_json({"error": text, "kind": kind})
    talk(f"error: {text}")
    return code
