"""Pipeline: compress one model by a recipe and write a folder of results. `tersor run` and the demo call it.

DIR/model.tersor       the compressed model; it is read back and compared
DIR/recipe.lock.yaml   the recipe with every setting, and the digest of every site that changed
DIR/report.json        what was done to each layer, and what was measured
DIR/journal/           every applied group, so that a killed run can resume; removed at the end
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import safetensors.torch

from tersor.core.history import first_given
from tersor.core.recipe import Recipe
from tersor.core.run import run
from tersor.core.state import State
from tersor.errors import RefusedError, SettingError, TersorError
from tersor.files import LOCKED, Paths, atomic, claim, output, write_text
from tersor.io.container import load
from tersor.io.container_writer import save
from tersor.measure.accuracy import compared
from tersor.model.grid_order import refuse_order
from tersor.model.learning_rates import check_globs
from tersor.model.needs import Needs
from tersor.model.sites import select
from tersor.model.task import Task
from tersor.record.observer import Observer
from tersor.report.console import to_json
from tersor.report.facts import facts_of
from tersor.steps import Entropy, Export, Rdoq
from tersor.steps.recipe_text import dump, lock
from tersor.threads import first

MODEL, LOCK, REPORT, JOURNAL = "model.tersor", "recipe.lock.yaml", "report.json", "journal"


def run_pipeline(
    given: State, recipe: Recipe, task: Task | None, out: str | Path, *,
    resume: bool = False, force: bool = False, journal: bool = True, keep_journal: bool = False,
    export: bool = False, tiny: bool = False, observer: Observer | None = None, inputs: Paths = (),
) -> tuple[State, dict[str, Any]]:  # fmt: skip
    """Run the recipe and write the folder of results; (result, facts).

    If there is a task, accuracy is measured at the end, unless the recipe has measured it there. Under a
    launcher of many processes, each runs the recipe and the first one writes. `export` comes last, so that
    a model that cannot be exported is still compressed; so is one whose last steps, `export` or `measure`,
    are refused. `tiny`: as in io.save. A folder with a finished run
    is refused unless `force`. `keep_journal`: keep the journal, for undo and replay of single steps.
    """
    refuse_order(recipe.steps, measured=task is not None or export)
    if export and task is None:
        raise SettingError("--export needs a task, for inputs to compare with. Give --task")
    for step in recipe.steps:  # a misspelt glob is an error now, not after hours of training
        if step.where != "*":
            select(given.sites, step.where, step.name)
        names = [name for name, site in given.sites.items() if site.is_parameter]
        check_globs(getattr(step, "lr_of", ""), names, step.name, "weight", "the model has")
    out, inputs = Path(out), list(inputs)
    for name in (MODEL, LOCK, REPORT):
        output(out / name, inputs)
    for path in (out / JOURNAL).rglob("*"):
        if not path.is_dir():  # trials have folders of their own
            output(path, inputs)
    kept = out / JOURNAL if journal else None
    finished = all((out / name).exists() for name in (MODEL, LOCK, REPORT)) and not (out / JOURNAL).exists()
    if first() and finished and not force:
        raise RefusedError(f"{out} holds a finished run. Name another folder, or run it again with --force")
    if first() and force and not resume and (out / JOURNAL).exists():
        with claim(out / JOURNAL / LOCKED):  # refused if another run is writing
            shutil.rmtree(out / JOURNAL, ignore_errors=True)
    if task is not None and given.given is not None:
        task.check(given.plain(), Needs.SCORES)  # accuracy is measured at the end in any case
    try:
        result = run(given, recipe, task, journal=kept, resume=resume, observer=observer, out=out)
    except TersorError as error:
        if error.done is None:
            raise
        written(error.done, task, out, tiny=tiny)  # hours of training, perhaps
        text = f"{str(error).rstrip('.')}. The network is written: {out / MODEL}. For other settings of "
        raise RefusedError(f"{text}export: tersor export {out / MODEL} --model MODEL --task TASK") from error
    facts = written(result, task, out, export=export, tiny=tiny)
    if first() and kept is not None and not keep_journal:
        shutil.rmtree(kept)
    return result, facts


def written(
    result: State, task: Task | None, out: Path, *, export: bool = False, tiny: bool = False,
    more: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write a result into the folder `out`, read it back, and return its facts with `more` facts. The first
    of many processes writes."""
    facts = facts_of(result) | (more or {})
    if task is not None:
        facts["task"] = task.name
        facts["metric"] = task.scored.name
        if "accuracy" not in facts and result.base is not None:
            facts["accuracy"] = compared(
                task.scores(first_given(result).model()), task.scores(result.model()), task.scored
            )
    if not first():
        return facts
    along = sum(map(len, result.attachments.values()))
    what = "safetensors, and the files that go along" if along else "safetensors"
    facts["out"] = str(out)
    exported = [note.data["path"] for note in result.ledger.notes("written")]
    facts["exported"] = [name for name in dict.fromkeys(exported) if (out / name).exists()]
    facts["files"] = {
        "given": {"nbytes": plain_nbytes(result) + along, "what": f"its tensors as they are, in {what}"},
        "result": {"nbytes": save(result, out / MODEL, tiny=tiny), "name": MODEL},
    }
    if load(out / MODEL).digest != result.digest:
        raise RefusedError(f"{out / MODEL}: the written file does not read back as the result of this run")
    write_text(out / LOCK, dump(lock(result)))
    write_text(out / REPORT, to_json(facts) + "\n")
    if export:
        notes = [*run(result, Export(), task, out=out).ledger.notes("written", first=-1)]
        facts["export"] = {**notes[-1].data, "text": "; ".join(note.text for note in notes)}
        write_text(out / REPORT, to_json(facts) + "\n")
    return facts


def rounded(
    given: State, task: Task, out: str | Path, *,
    max_drop: float, zeros: str = "*", tiny: bool = False, observer: Observer | None = None,
    inputs: Paths = (),
) -> dict[str, Any]:  # fmt: skip
    """Round the weights for the smallest file that loses at most `max_drop`, write it, and return the facts.

    The written file is read back and measured. `inputs`: as in run_pipeline().
    """
    output(out, inputs)
    recipe = Recipe((Rdoq(max_drop=max_drop), Entropy()), zeros=zeros)
    result = run(given, recipe, task, observer=observer)
    save(result, out, tiny=tiny)
    now = task.scores(load(out).model(given.given))
    found = compared(task.scores(given.model()), now, task.scored)
    *_, decided = result.ledger.notes("decided")
    return {"task": task.name, "max_drop": max_drop, "accuracy": found, "decided": dict(decided.data)}


def plain_nbytes(result: State) -> int:
    """Bytes of a plain file of the tensors as they were first given, or as they are now if the first ones are
    not known."""
    return len(plain(result if result.base is None else first_given(result)))


def write_plain(given: State, path: Path) -> int:
    """Write the decoded tensors as safetensors, tied ones once. Returns the file's bytes."""
    with atomic(path) as file:
        return file.write(plain(given))


def plain(given: State) -> bytes:
    """The decoded tensors as safetensors, tied ones once."""
    sites = given.sites
    tensors = {n: form.decode().to(sites[n].torch_dtype).contiguous() for n, form in given.forms.items()}
    return safetensors.torch.save(tensors)
