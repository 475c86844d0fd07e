"""CLI: the command line calls functions, prints results on stdout and messages on stderr. It has no logic.

Commands that run a file in a runtime, score it or list the zoo are in commands.py. How a command ends, with
which exit code, is in exits.py.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from tersor import commands
from tersor.exits import Answer, ended
from tersor.options import (
    MODEL,
    TASKS,
    All,
    Arch,
    Base,
    File,
    Folder,
    Json,
    Key,
    Model,
    Quiet,
    Tiny,
    Weights,
    Words,
    Workers,
    Zeros,
)

app = typer.Typer(
    name="tersor", help="Terse tensors: compress trained PyTorch models, with measured proof.",
    add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
)  # fmt: skip


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
        typer.Option(
            "--task",
            metavar="TASK",
            help=TASKS,
        ),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", metavar="FILE", help="recipe.yaml, a lock file, or zoo:NAME")
    ] = None,
    weights: Weights = None,
    key: Key = None,
    arch: Arch = None,
    base: Base = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue the run in DIR/journal")] = False,
    force: Annotated[bool, typer.Option("--force", help="run again in a folder with a finished run")] = False,
    keep_journal: Annotated[
        bool, typer.Option("--keep-journal", help="keep DIR/journal, for undo and replay of single steps")
    ] = False,
    seed: Annotated[int | None, typer.Option("--seed", metavar="N", help="instead of the recipe's")] = None,
    zeros: Zeros = None,
    export: Annotated[bool, typer.Option("--export", help="also write DIR/model.onnx")] = False,
    tiny: Tiny = False,
    every: All = False,
    json: Json = False,
    quiet: Quiet = False,
) -> Answer:
    """Compress a model by a recipe, into a folder."""
    from tersor.pipeline import run_pipeline
    from tersor.report.progress import watching
    from tersor.report.table import report
    from tersor.resolve import resolve_files, resolve_model, resolve_recipe, resolve_task

    steps = resolve_recipe(recipe, words, seed=seed, zeros=zeros)
    data = resolve_task(task)
    given = resolve_model(model, weights=weights, key=key, arch=arch, base=base, task=data)
    inputs = resolve_files(model, arch, recipe, task, weights=[weights, base])
    with watching(quiet=quiet, plain=json) as observer:
        _, facts = run_pipeline(
            given, steps, data, out, resume=resume, force=force, keep_journal=keep_journal, export=export,
            tiny=tiny, observer=observer, inputs=inputs,
        )  # fmt: skip
    return Answer(facts, json, partial(report, every=every))


@app.command()
def check(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="recipe.yaml")],
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help=f"also list the weights of each step: {MODEL}"),
    ] = None,
    *,
    weights: Weights = None,
    key: Key = None,
    arch: Arch = None,
    json: Json = False,
) -> Answer:
    """Report what a recipe does, needs and loses."""
    from tersor.check import check as examine
    from tersor.report.check_lines import lines
    from tersor.resolve import resolve_model, resolve_recipe

    steps = resolve_recipe(recipe, None)
    given = None if model is None else resolve_model(model, weights=weights, key=key, arch=arch)
    return Answer(
        {"recipe": str(recipe), "digest": steps.digest, "steps": examine(steps, given)}, json, lines
    )


@app.command()
def steps(
    step: Annotated[
        str | None, typer.Argument(metavar="[STEP]", help="a step, to list its settings: prune")
    ] = None,
    json: Json = False,
) -> Answer:
    """List the steps, or the settings of one."""
    from tersor.report.steps_table import described, tables

    return Answer(described(step), json, tables)


SHOWN = "a .tersor file, weights, a folder of them, a run's folder or report.json; with --groups a model"


@app.command()
def show(
    file: Annotated[Path, typer.Argument(metavar="FILE", help=SHOWN)],
    site: Annotated[str | None, typer.Argument(metavar="[SITE]", help="a name or a glob: 'conv*'")] = None,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="OUT.html", help="also write a page that draws where the bytes are"),
    ] = None,
    *,
    groups: Annotated[
        bool, typer.Option("--groups", help=f"what can be cut from a model instead: {MODEL}")
    ] = False,
    task: Annotated[
        str | None, typer.Option("--task", metavar="TASK", help="for --groups: its inputs trace the model")
    ] = None,
    weights: Weights = None,
    arch: Arch = None,
    key: Key = None,
    every: All = False,
    json: Json = False,
) -> Answer:
    """Show forms, bytes and history of a file, or the groups of a model's units."""
    if groups:
        from tersor.report import unit_groups
        from tersor.resolve import resolve_model, resolve_task

        data = resolve_task(task)
        given = resolve_model(str(file), weights=weights, arch=arch, task=data)
        return Answer(unit_groups.described(given, data), json, partial(unit_groups.tables, every=every))
    from tersor.described import described

    facts, tables = described(file, site, html, key=key, every=every or site is not None)
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
        typer.Option(
            "--max-drop", metavar="DROP", help="quantize, with at most this loss of the task's metric"
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="MODEL", help="for --max-drop: the code of the model")
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", metavar="TASK", help="for --max-drop: the task that measures it")
    ] = None,
    attach: Annotated[
        bool,
        typer.Option("--attach/--no-attach", help="with a folder's configuration, tokenizer and licence"),
    ] = True,
    zeros: Zeros = None,
    tiny: Tiny = False,
    workers: Workers = None,
    json: Json = False,
    quiet: Quiet = False,
) -> Answer:
    """Compress a weights file; lossless without steps."""
    from tersor.io.pack import pack as pack_file
    from tersor.pipeline import rounded
    from tersor.report.file_sizes import packed, packed_lines, rounded_lines, sizes
    from tersor.report.progress import watching
    from tersor.resolve import resolve_files, resolve_recipe, resolve_rounding, rounded_from

    rounding = resolve_rounding(
        weights, max_drop, model, task, words, key=key, workers=workers, attach=attach and not tiny
    )
    with watching(quiet=quiet, plain=json) as observer:
        if rounding is not None:
            inputs = resolve_files(model, task, weights=[weights])
            facts = rounded(
                *rounding, out, max_drop=max_drop or 0.0, zeros=zeros or "*", tiny=tiny, observer=observer,
                inputs=inputs,
            )  # fmt: skip
            # The file may hold more than the model uses.
            found = sizes(weights, out, *rounded_from(rounding[0], weights))
            return Answer(found | facts, json, rounded_lines)
        observer.step(1, 1, "pack")
        recipe = resolve_recipe(None, words or ["entropy"], zeros=zeros)
        done = pack_file(
            weights, out, recipe, key=key, attach=attach, tiny=tiny, workers=workers, observer=observer
        )
    return Answer(packed(weights, out, done, recipe.steps), json, packed_lines)


@app.command()
def unpack(
    file: File,
    out: Annotated[
        str,  # a Path would lose the slash of a folder
        typer.Option(
            "--out", "-o", metavar="WEIGHTS", help="the .safetensors file to write, or a new folder: DIR/"
        ),
    ],
    *,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="GLOB", help="read and write only these tensors"),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option("--shard", metavar="SIZE", help="a folder of files of at most this size: 2GB"),
    ] = None,
    workers: Workers = None,
    json: Json = False,
    quiet: Quiet = False,
) -> Answer:
    """Write a file's weights, decoded, as safetensors."""
    from tersor.io.other_network import other_network
    from tersor.io.unpack import unpack as unpack_file
    from tersor.report.file_sizes import unpacked, unpacked_lines
    from tersor.report.progress import watching

    with watching(quiet=quiet, plain=json) as observer:
        observer.step(1, 1, "unpack")
        unpack_file(file, out, only=only or "*", shard=shard, workers=workers, observer=observer)
    return Answer(unpacked(file, Path(out), only or [], other_network(file)), json, unpacked_lines)


OLD = "a .tersor file, .safetensors, a saved state dict or a checkpoint folder"


@app.command()
def diff(
    old: Annotated[Path, typer.Argument(metavar="OLD", help=OLD)],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="the new file, of any of these kinds")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="PATCH", help="the patch to write")],
    *,
    json: Json = False,
    quiet: Quiet = False,
) -> Answer:
    """Write the difference between two files."""
    from tersor.io.patch.diff import diff as diff_files
    from tersor.report.file_sizes import diffed, diffed_lines
    from tersor.report.progress import watching

    with watching(quiet=quiet, plain=json) as observer:
        observer.step(1, 1, "diff")
        done = diff_files(old, new, out, observer=observer)
    return Answer(diffed(old, new, out, done), json, diffed_lines)


@app.command()
def patch(
    old: Annotated[Path, typer.Argument(metavar="OLD", help="the old file given to diff")],
    changes: Annotated[Path, typer.Argument(metavar="PATCH", help="the patch that diff wrote")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="NEW", help="the file or new folder to write")],
    *,
    json: Json = False,
    quiet: Quiet = False,
) -> Answer:
    """Make the new file from the old one and a patch."""
    from tersor.io.patch.patch import patch as patch_file
    from tersor.report.file_sizes import patched, patched_lines
    from tersor.report.progress import watching

    with watching(quiet=quiet, plain=json) as observer:
        observer.step(1, 1, "patch")
        patch_file(old, changes, out, observer=observer)
    return Answer(patched(old, changes, out), json, patched_lines)


@app.command()
def verify(file: File, workers: Workers = None, json: Json = False) -> Answer:
    """Check every part of a file."""
    from tersor.io.verify import verify as verify_file
    from tersor.report.file_sizes import verified, verified_lines

    facts = verified(file, verify_file(file, workers=workers))
    return Answer(facts, json, verified_lines, code=0 if facts["sound"] else 1)


app.command("compress")(commands.compress)
app.command("export")(commands.export)
app.command("eval")(commands.evaluate)
app.command("compare")(commands.compare)
app.command("zoo")(commands.zoo)


@app.callback(invoke_without_command=True)
def about(
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    """Terse tensors: compress trained PyTorch models, with measured proof."""
    if version:
        from tersor import __version__

        print(f"tersor {__version__}")


def main() -> int:
    """Run the command in sys.argv and return the exit code."""
    return ended(app)
