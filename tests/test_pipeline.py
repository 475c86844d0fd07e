"""Pipeline: the written file is read back before the run reports success."""

from pathlib import Path
from typing import Any

import pytest
from tiny import tiny

import tersor.pipeline
from tersor.core.recipe import Recipe
from tersor.core.run import run
from tersor.core.state import State, start
from tersor.errors import JournalError, RefusedError, SiteError
from tersor.io.container import load
from tersor.io.container_writer import save
from tersor.record.journal import Journal
from tersor.steps import Finetune, Prune

RECIPE = Recipe((Prune(keep=0.5),))


def test_the_file_is_what_is_returned(tmp_path: Path) -> None:
    t = tiny("mlp")
    result, _ = tersor.pipeline.run_pipeline(start(t.model), RECIPE, t.task, tmp_path)
    assert load(tmp_path / "model.tersor").digest == result.digest == run(t.model, RECIPE, t.task).digest


def test_a_file_that_reads_back_as_another_model_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = tiny("mlp")
    other = run(t.model, Prune(keep=0.9))

    def wrong(result: State, path: Path, **more: Any) -> int:
        return save(other, path, **more)

    monkeypatch.setattr(tersor.pipeline, "save", wrong)
    with pytest.raises(RefusedError, match=r"model\.tersor: the written file does not read back"):
        tersor.pipeline.run_pipeline(start(t.model), RECIPE, t.task, tmp_path)
    assert not (tmp_path / "recipe.lock.yaml").exists()
    assert not (tmp_path / "report.json").exists()


def test_force_keeps_the_journal_of_an_active_run(tmp_path: Path) -> None:
    t, journal = tiny("mlp"), tmp_path / "journal"
    with Journal(journal, {}, resume=False):
        before = sorted(journal.iterdir())
        with pytest.raises(JournalError, match="another run is writing here"):
            tersor.pipeline.run_pipeline(start(t.model), RECIPE, t.task, tmp_path, force=True)
        assert sorted(journal.iterdir()) == before
    tersor.pipeline.run_pipeline(start(t.model), RECIPE, t.task, tmp_path, force=True)
    assert not journal.exists()


def test_folders_of_trials_in_the_journal_are_no_outputs(tmp_path: Path) -> None:
    t = tiny("mlp")
    run(t.model, RECIPE, t.task, journal=tmp_path / "journal")
    (tmp_path / "journal" / "trial-0.0").mkdir()
    result, _ = tersor.pipeline.run_pipeline(start(t.model), RECIPE, t.task, tmp_path, resume=True)
    assert result.digest == run(t.model, RECIPE, t.task).digest


def test_a_misspelt_glob_of_a_later_step_is_reported_before_any_training(tmp_path: Path) -> None:
    t = tiny("mlp")
    recipe = Recipe((Prune(epochs=1), Finetune(lr_of="nothing.*=3")))
    with pytest.raises(SiteError, match=r"finetune: lr_of: 'nothing\.\*' matches no weight"):
        tersor.pipeline.run_pipeline(start(t.model), recipe, t.task, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    name = next(iter(start(t.model).sites))
    recipe = Recipe((Prune(epochs=1), Finetune(lr_of=f"{name}=3")))
    tersor.pipeline.run_pipeline(start(t.model), recipe, t.task, tmp_path / "out")
