"""Compress: a budget in, a model out: recipes are tried (plan.py, trials.py), the best one is written.

samples that decide   labelled calibration batches, every second one; else half of the evaluation set if
                      trials train; else a fifth of the training data (steps/drop_search.py)
samples that judge    the evaluation set, without those that decide, at the end: the best trial whose drop is
                      within the budget there too
DIR/model.tersor, recipe.lock.yaml, report.json   as of tersor run; the report has all trials
DIR/model.onnx                                    if latency counts
DIR/search.html                                   all trials, drawn
DIR/trials/                                       for --resume; removed at the end, unless the time was up
"""

from __future__ import annotations

import itertools
import math
import time
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from tersor.candidates.export import write
from tersor.core.history import first_given
from tersor.core.state import State, start
from tersor.errors import BudgetError, RefusedError, SettingError, TaskError
from tersor.files import LOCKED, Paths, claim, output, write_text
from tersor.measure.accuracy import compared
from tersor.model.batches import steady
from tersor.model.needs import Needs
from tersor.model.task import Task
from tersor.pipeline import LOCK, MODEL, REPORT, written
from tersor.record.observer import Observer
from tersor.report.console import settings
from tersor.report.facts import unusual
from tersor.report.search_page import page
from tersor.runtimes import MOST_THREADS, check_runtime
from tersor.search.ahead import RayWorkers
from tersor.search.budget import Budget, read_budget
from tersor.search.hold_out import hold_out
from tersor.search.plan import Plan
from tersor.search.trials import FOLDER, OutOfTime, Trial, Trials, remove_trials, trials_in
from tersor.settings import settings_of
from tersor.steps import Export
from tersor.steps.drop_search import Deciding, Part, deciding

EPOCHS = 1.0  # of each training
MOST_WORKERS = 64  # no dial has as many settings
AIMS = ("size", "latency", "accuracy")
WHO = "compress"
MIXED = (
    "its training batches cannot be parted, and what decides must not train. Give Task(calibrate=...) "
    "labelled batches, evaluate= two batches or more, or train= a list, or a DataLoader over a set with "
    "indices without a sampler of its own"
)
FROZEN = "the model's parameters have requires_grad=False. Set it to True for those that may be trained"
CALIBRATE = 1024  # samples of the training data that calibrate, if no others do
ONNX = "model.onnx"
PAGE = "search.html"


def compress(
    model: nn.Module | State, task: Task, budget: Budget | str, out: str | Path, *,
    aim: str | None = None, epochs: float = EPOCHS, lr: float = 0.001, minutes: float | None = None,
    batch: int = 1, threads: int = 1, seed: int = 0, tiny: bool = False, resume: bool = False,
    workers: int = 0, observer: Observer | None = None, inputs: Paths = (),
) -> tuple[State, dict[str, Any]]:  # fmt: skip
    """The best model within the budget, written to the folder `out`, and the facts as JSON.

    The given model is not changed. `budget`: "drop<=0.5,size<=10%,latency<=50%@onnxruntime", or some of it.

    `aim`: what to have least of, "size" or "latency", or "accuracy" for the least drop. If not given: size if
    a drop is bounded, latency if that is too, else accuracy. `epochs` and `lr`: of the training after units
    were removed; without training data, or with epochs=0, layers are only refitted. `minutes`: no trial
    begins later. `batch`, `threads`: of a call that is timed. `workers`: trials that run at once, on the
    Ray cluster of RAY_ADDRESS or on this machine; 0: one after the other, here. BudgetError names the nearest
    trial if none is within.
    """
    observer, out = observer or Observer(), Path(out)
    given = model if isinstance(model, State) else start(model, task)
    budget = read_budget(budget) if isinstance(budget, str) else budget
    aim = aim or default_aim(budget)
    runtime = budget.runtime or ("onnxruntime" if aim == "latency" else "")
    checked(
        aim, budget.drop, runtime, epochs=epochs, lr=lr, minutes=minutes, batch=batch, threads=threads,
        workers=workers, seed=seed,
    )  # fmt: skip
    if given.given is None:
        raise RefusedError(f"{WHO}: the model's code is needed. Give --arch file.py:factory")
    for name in (MODEL, LOCK, REPORT, ONNX, PAGE):
        output(out / name, list(inputs))
    tried = trials_in(out / FOLDER)
    if (out / REPORT).exists() and not tried:
        raise RefusedError(f"{out} holds a finished run. Name another folder")
    if tried and not resume:
        claim(out / FOLDER / LOCKED).close()  # one that runs now is to be waited for, not removed
        raise RefusedError(
            f"{out / FOLDER} holds the trials of a search. Continue it with --resume, which also takes "
            "another budget, or remove them"
        )
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    task.check(given.plain(), Needs.SCORES)
    decide, work, judge = parts(given, task, budget, epochs)
    untrained = "" if not epochs or task.train is None else why_untrained(given, work)
    if untrained:
        observer.message(f"{WHO}: nothing is trained: {untrained}")
    with claim(out / FOLDER / LOCKED):
        trials = Trials(
            given, work, decide, budget, out, runtime, batch, threads, seed, tiny,
            began + 60 * minutes if minutes else math.inf, observer,
        )  # fmt: skip
        plan = Plan(trials, aim, epochs if work.train is not None and not untrained else 0.0, lr)
        if plan.epochs and (why := why_untaught(given, work)):
            plan.teacher = 0.0
            observer.message(f"{WHO}: trained by the task's loss alone, without the given model: {why}")
        stopped = walked(plan, workers)
        best, judged, beyond = chosen(plan, judge)
        search = facts_of_search(trials, best, aim, stopped=stopped, beyond=beyond) | {"untrained": untrained}
        if best is not None:
            result = trials.state(best)
            facts = finished(result, task, trials, best, {"search": search, "accuracy": judged})
        write_text(out / PAGE, page(search))
        if best is None:
            raise BudgetError(unmet(trials, plan, stopped, beyond))
    if not stopped:  # what has run so far may go on
        remove_trials(out / FOLDER)
    return result, facts


def default_aim(budget: Budget) -> str:
    if budget.drop is None:
        return "accuracy"
    return "size" if budget.latency is None else "latency"


def checked(
    aim: str,
    drop: float | None,
    runtime: str,
    *,
    epochs: float,
    lr: float,
    minutes: float | None,
    batch: int,
    threads: int,
    workers: int,
    seed: int,
) -> None:
    """Refuse settings that are not allowed, and a runtime that is not there, before anything runs."""
    if aim not in AIMS:
        raise SettingError(f"{WHO}: aim={aim!r}, but it is one of {', '.join(AIMS)}")
    if aim != "accuracy" and drop is None:
        raise SettingError(f"{WHO}: aim={aim} needs a bound on the drop too: drop<=0.5")
    for word, value, fine in (
        ("epochs", epochs, 0 <= epochs < math.inf),
        ("lr", lr, 0 < lr < math.inf),
        ("minutes", minutes, minutes is None or 0 < minutes < math.inf),
        ("batch", batch, batch >= 1),
        ("threads", threads, 1 <= threads <= MOST_THREADS),
        ("workers", workers, 0 <= workers <= MOST_WORKERS),
        ("seed", seed, seed >= 0),
    ):
        if not fine:
            raise SettingError(f"{WHO}: {word}={value}, which is too small or too large")
    if runtime:
        check_runtime(runtime, WHO)


def search_task(
    model: nn.Module | State, task: Task, budget: Budget | str, *, epochs: float = EPOCHS
) -> Task:
    """The task that the steps of `compress(model, task, budget)` have: `run(model, recipe, search_task(...))`
    repeats a trial, which the task itself does not if a part of its training data decided or calibrated."""
    given = model if isinstance(model, State) else start(model, task)
    return parts(given, task, read_budget(budget) if isinstance(budget, str) else budget, epochs).work


class Parts(NamedTuple):
    """Who has which samples. No sample is in two of them."""

    decide: Deciding
    work: Task  # for the steps of trials
    judge: Task  # its evaluation set judges the result


def parts(given: State, task: Task, budget: Budget, epochs: float) -> Parts:
    """Labelled calibration batches decide. Else, if trials train, half of the evaluation set: the given model
    knows its training data by heart, so any training that they do not take part in loses on them. Else a
    fifth of the training data, which neither trains nor calibrates."""
    limit = math.inf if budget.drop is None else budget.drop
    trains = bool(epochs) and task.train is not None and trainable(given)
    halves = hold_out(task, "evaluate") if trains else None
    fifth = hold_out(task) if task.train is not None else None
    judge, held = (task.evaluate, None) if halves is None else halves
    able = task if fifth is None else replace(task, train=fifth[1])
    decide = deciding(able, given.model(), limit, WHO, word="drop", held=held)
    fit = task.train
    if decide.word == "train":  # what decides trains nothing
        fit = None if fifth is None else fifth[0]
    if decide.word != "evaluate":
        judge = task.evaluate
    work = replace(decide.rest, train=fit)
    if work.calibrate is None and task.train is not None:
        source = replace(task, train=task.train if fit is None else fit)
        with steady(source.train):  # the same samples when the search is resumed
            work = replace(work, calibrate=list(Part(source, "train", most=CALIBRATE)))
    return Parts(decide, work, replace(task, evaluate=judge))


def trainable(given: State) -> bool:
    return any(p.requires_grad for p in given.model().parameters())


def why_untrained(given: State, work: Task) -> str:
    """Why no trial trains, although there are training data; "" if they do."""
    if work.train is None:
        return MIXED
    return why_not(given, work, Needs.LOSS) if trainable(given) else FROZEN


def why_untaught(given: State, work: Task) -> str:
    """Why the given model cannot teach: its outputs have no loss; "" if it can."""
    return why_not(given, work, Needs.SOFT)


def why_not(given: State, task: Task, needs: Needs) -> str:
    """Why a task lacks what training needs; "" if it has it."""
    try:
        task.check(given.plain(), needs)
    except TaskError as error:
        return str(error)
    return ""


def walked(plan: Plan, workers: int) -> bool:
    """Run the trials, with so many workers ahead of the search; whether time was up."""
    trials = plan.trials
    with ExitStack() as stack:
        if workers:
            ray = RayWorkers(
                workers, given=trials.given, task=trials.task, seed=trials.seed, folder=trials.folder,
                observer=trials.observer,
            )  # fmt: skip
            trials.workers = stack.enter_context(closing(ray))
            stack.callback(setattr, trials, "workers", None)
        try:
            plan.walk()
        except OutOfTime:
            return True
    return False


def chosen(plan: Plan, task: Task) -> tuple[Trial | None, dict[str, Any], list[dict[str, Any]]]:
    """The best trial that the evaluation set does not contradict, what that set says of it, and the better
    ones that it does contradict."""
    trials, beyond = plan.trials, list[dict[str, Any]]()
    before = task.scores(first_given(trials.given).model())
    for trial in plan.ranked():
        judged = compared(before, task.scores(trials.state(trial).model()), task.scored)
        if trials.budget.drop is None or judged["drop"][0] <= trials.budget.drop:
            again = trials.timed_again(trial)  # the best of many times was lucky, perhaps
            if "latency" not in trials.over(again):
                return again, judged, beyond
            beyond.append({"name": trial.name, "drop": judged["drop"], "latency": again.latency})
            trials.observer.message(f"{trial.name}: timed again, {trials.in_words(again)}: not taken")
            continue
        beyond.append({"name": trial.name, "drop": judged["drop"]})
        trials.observer.message(
            f"{trial.name}: drop {judged['drop'][0]:+.3g} on the evaluation set: not taken"
        )
    return None, {}, beyond


def finished(result: State, task: Task, trials: Trials, best: Trial, more: dict[str, Any]) -> dict[str, Any]:
    """Write the files of the best trial, and return the facts."""
    if best.latency is not None:
        more["latency"] = best.latency
        more["export"] = write(result, task, trials.out / ONNX, Export(to=trials.runtime))
    else:
        (trials.out / ONNX).unlink(missing_ok=True)  # of another model: an earlier part of this search timed
    return written(result, task, trials.out, tiny=trials.tiny, more=more)


def facts_of_search(
    trials: Trials, best: Trial | None, aim: str, *, stopped: bool, beyond: list[dict[str, Any]]
) -> dict[str, Any]:
    """The budget, who decided, and every trial, as JSON."""
    rows: list[dict[str, Any]] = []
    for trial in trials.found.values():
        row = {"name": trial.name, "recipe": in_words(trial), "why": trial.why, "seconds": trial.seconds}
        if not trial.why:
            row |= {"drop": list(trial.drop), "nbytes": trial.nbytes, "latency": trial.latency}
            row["short"] = trial.reached if trial.short else None
            row["over"] = trials.over(trial)
        rows.append(row)
    return {
        "budget": str(trials.budget), "bounds": trials.bounds(), "aim": aim,
        "decided_by": trials.decide.name, "stopped": stopped,
        "beyond": beyond, "given_nbytes": trials.given_nbytes, "trials": rows,
        "best": best.name if best else None, "recipe": in_words(best) if best else None,
        "drop": list(best.drop) if best else None,
        "metric": trials.task.scored.name, "unit": trials.task.scored.unit,
    }  # fmt: skip


def in_words(trial: Trial) -> str:
    """The recipe of a trial as `tersor run` takes it."""
    facts = [{"step": step.name, "settings": settings_of(step)} for step in trial.recipe]
    return " ".join(f"{step['step']} {settings(unusual(step))}".strip() for step in facts)


def unmet(trials: Trials, plan: Plan, stopped: bool, beyond: list[dict[str, Any]]) -> str:
    """Why no trial is within the budget, and what to do."""
    slow = [item["name"] for item in beyond if "latency" in item]
    if slow:
        return (
            f"{WHO}: timed again, {', '.join(slow)} is over {trials.budget}: times vary here by more "
            "than what is left. Time on an idle machine, with --resume, or allow more latency"
        )
    if beyond:
        each = ", ".join(f"{item['name']} {item['drop'][0]:.3g}" for item in beyond)
        return (
            f"{WHO}: the evaluation set shows drops above {trials.budget.drop:g}: {each}. The "
            f"{trials.decide.name} that decide show less: they are not like those that judge, or few. Give "
            "Task(calibrate=...) labelled batches that are, held out from training, or allow a larger drop"
        )
    tried = [trial for trial in trials.found.values() if not trial.why]
    what = f"{WHO}: none of {len(trials.found)} trials is within {trials.budget}"
    if not tried:
        refused = dict.fromkeys(trial.why for trial in trials.found.values())
        return f"{what}: all were refused. {' '.join(itertools.islice(refused, 2))}"
    near = min(
        tried,
        key=lambda trial: (len(trials.over(trial)), max(trials.used(trial).values()), *plan.worth(trial)),
    )
    text = (
        f"{what}. Nearest: {near.name}: {trials.in_words(near)}. Allow more of {', '.join(trials.over(near))}"
    )
    if stopped:
        return f"{text}, or more minutes, with --resume"
    if "drop" not in trials.over(near):  # training makes nothing smaller or faster
        return text
    if not plan.epochs:
        return f"{text}, or train after units are removed: Task(train=...) and --epochs"
    return f"{text}, or train longer: --epochs, now {plan.epochs:g}"
