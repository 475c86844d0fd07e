"""Commands: compress, which searches; export, eval and compare, which run or score a file; and zoo.

As in cli.py, they call functions and have no logic.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tersor.exits import Answer
from tersor.options import TASKS, Arch, Base, Folder, Json, Key, Model, Quiet, Tiny, Weights

CANDIDATE = "a .tersor file, a checkpoint, a .pt2 file, or base: the model itself"
RUNNING = "a .tersor file, a checkpoint, an .onnx or .pt2 file, or base: the model itself"
Code = Annotated[
    str | None,
    typer.Option("--model", metavar="MODEL", help="the code: file.py:factory, torchvision:NAME, hf:FOLDER"),
]
TaskOf = Annotated[
    str,
    typer.Option(
        "--task",
        metavar="TASK",
        help=TASKS,
    ),
]
RuntimeOf = Annotated[str, typer.Option("--runtime", metavar="RUNTIME", help="that runs .onnx files")]


def compress(
    model: Model,
    *,
    task: TaskOf,
    budget: Annotated[
        str,
        typer.Option(
            "--budget", metavar="BOUNDS", help='some of "drop<=0.5,size<=10%,latency<=50%@onnxruntime"'
        ),
    ],
    out: Folder,
    aim: Annotated[
        str | None,
        typer.Option("--aim", metavar="WORD", help="to have least of: size, latency, or accuracy's drop"),
    ] = None,
    epochs: Annotated[
        float, typer.Option("--epochs", metavar="N", help="of training after units were removed; 0: none")
    ] = 1.0,
    lr: Annotated[float, typer.Option("--lr", metavar="RATE", help="the learning rate of that")] = 0.001,
    minutes: Annotated[
        float | None, typer.Option("--minutes", metavar="N", help="no trial begins later")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", metavar="N", help="samples in a call that is timed")] = 1,
    threads: Annotated[int, typer.Option("--threads", metavar="N", help="CPU threads of it")] = 1,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="of every trial")] = 0,
    workers: Annotated[
        int, typer.Option("--workers", metavar="N", help="trials at once, by Ray; 0: one after the other")
    ] = 0,
    weights: Weights = None,
    key: Key = None,
    arch: Arch = None,
    base: Base = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="continue the search in DIR/trials, with any budget")
    ] = False,
    tiny: Tiny = False,
    json: Json = False,
    quiet: Quiet = False,
) -> Answer:
    """Find the smallest or fastest model within a budget, by trying recipes."""
    from tersor.report.progress import watching
    from tersor.report.search_table import tables
    from tersor.resolve import resolve_files, resolve_model, task_of
    from tersor.search.compress import compress as search

    data = task_of(task)
    given = resolve_model(model, weights=weights, key=key, arch=arch, base=base, task=data)
    inputs = resolve_files(model, arch, task, weights=[weights, base])
    with watching(quiet=quiet, plain=json) as observer:
        _, facts = search(
            given, data, budget, out, aim=aim, epochs=epochs, lr=lr, minutes=minutes, batch=batch,
            threads=threads, seed=seed, tiny=tiny, resume=resume, workers=workers, observer=observer,
            inputs=inputs,
        )  # fmt: skip
    return Answer(facts, json, tables)


def export(
    file: Annotated[str, typer.Argument(metavar="FILE", help=CANDIDATE)],
    *,
    model: Code = None,
    task: Annotated[
        str | None, typer.Option("--task", metavar="TASK", help="its first calibration batch is the example")
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            "--shape", metavar="SIZES", help="without a task, for each input: 1x3x224x224, int64:1x128"
        ),
    ] = None,
    to: Annotated[str, typer.Option("--to", metavar="RUNTIME", help="the runtime")] = "onnxruntime",
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="OUT", help="the file to write; default: FILE's name with .onnx"),
    ] = None,
    weights: Annotated[
        str, typer.Option("--weights", metavar="WORD", help="packed: codes stay codes; float: decoded")
    ] = "packed",
    dynamic_batch: Annotated[
        bool,
        typer.Option(
            "--dynamic-batch/--no-dynamic-batch", help="batches of any size, or only of the example's"
        ),
    ] = True,
    dynamic_axes: Annotated[
        str,
        typer.Option(
            "--dynamic-axes", metavar="AXES", help="of any size too: 1 for tokens, 2,3 for height and width"
        ),
    ] = "",
    key: Key = None,
    json: Json = False,
    quiet: Quiet = False,
) -> Answer:
    """Write a file for a runtime, and compare its outputs with PyTorch's."""
    from tersor.candidates.candidate import candidate
    from tersor.candidates.export import export as written
    from tersor.candidates.export import path_for
    from tersor.report.comparison import exported_lines
    from tersor.report.progress import watching
    from tersor.resolve import resolve_files, resolve_task

    data = resolve_task(task)
    of = candidate(file, model, key=key, who="export")
    inputs = resolve_files(model, task, weights=[of.path])
    with watching(quiet=quiet, plain=json) as observer:
        facts = written(
            of, out or path_for(of), data, shapes=shape or (), to=to, weights=weights,
            dynamic_batch=dynamic_batch, dynamic_axes=dynamic_axes, observer=observer, inputs=inputs,
        )  # fmt: skip
    return Answer(facts, json, exported_lines)


def evaluate(
    file: Annotated[str, typer.Argument(metavar="FILE", help=RUNNING)],
    *,
    task: TaskOf,
    model: Code = None,
    runtime: RuntimeOf = "onnxruntime",
    key: Key = None,
    json: Json = False,
    quiet: Quiet = False,
) -> Answer:
    """Measure a file's accuracy on a task."""
    from tersor.candidates.candidate import candidate
    from tersor.candidates.evaluate import evaluate as scored
    from tersor.report.comparison import evaluated_lines
    from tersor.report.progress import watching
    from tersor.resolve import task_of

    data = task_of(task)
    of = candidate(file, model, key=key, runtime=runtime, who="eval")
    with watching(quiet=quiet, plain=json) as observer:
        facts = scored(of, data, observer)
    return Answer(facts, json, evaluated_lines)


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help=RUNNING)],
    b: Annotated[str, typer.Argument(metavar="B", help="the other one, of any of these kinds")],
    *,
    task: TaskOf,
    model: Code = None,
    model_b: Annotated[
        str | None, typer.Option("--model-b", metavar="MODEL", help="the code of B; default: that of A")
    ] = None,
    latency: Annotated[
        bool, typer.Option("--latency", help="also time both in a runtime, in turn, and A against itself")
    ] = False,
    batch: Annotated[
        int | None, typer.Option("--batch", metavar="N", help="for --latency: samples in a call")
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", metavar="N", help="for --latency: CPU threads")
    ] = None,
    runtime: RuntimeOf = "onnxruntime",
    key: Key = None,
    json: Json = False,
    quiet: Quiet = False,
) -> Answer:
    """Compare two files on a task: accuracy in pairs, equal decisions, bytes, speed."""
    from tersor.candidates.candidate import pair
    from tersor.candidates.compare import compare as compared
    from tersor.report.comparison import compared_tables
    from tersor.report.progress import watching
    from tersor.resolve import task_of

    data = task_of(task)
    first, second = pair(a, b, model, model_b, key=key, runtime=runtime)
    with watching(quiet=quiet, plain=json) as observer:
        facts = compared(
            first, second, data, latency=latency, batch=batch, threads=threads, runtime=runtime,
            observer=observer,
        )  # fmt: skip
    return Answer(facts, json, compared_tables)


def zoo(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="an architecture: mobilenet_v2")
    ] = None,
    json: Json = False,
) -> Answer:
    """List the architectures that come with their task, or show one."""
    from tersor.report.zoo_table import described, tables

    return Answer(described(name), json, tables)
