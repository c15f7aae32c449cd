"""When a run is done, and what is read of it."""

import json

import pytest

from t2i_jax.errors import MissingError
from t2i_jax.study import results, suite, worker

LAST = {"step": 1000, "loss": 0.1}
SCORES = {"step": 1000, "score": 0.5, "score/counting": 0.4, "score/control_null": 0.01}
HELD_OUT = {"step": 1000, "validation_loss": 0.3, "validation_loss_t0.1": 0.2}


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setattr(results.checkpoint, "find", lambda folder: (folder, 1000))
    return suite.load("paper_small").runs([0])[0]


def write(folder, *lines):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_everything_of_a_run(run, tmp_path):
    early = [{"step": 500, "score": 0.2}, {"step": 500, "validation_loss": 0.6}]
    write(tmp_path, *early, LAST, HELD_OUT, SCORES)
    found = results.of_run(run, tmp_path)
    assert (found["row"], found["seed"], found["images"]) == ("baseline", 0, 120)
    assert (found["score"], found["validation_loss"]) == (0.5, 0.3)
    assert found["categories"] == {"counting": 0.4} and found["controls"] == {"null": 0.01}
    assert found["by_time"] == {"0.1": 0.2}
    assert found["curves"]["score"] == [[500, 0.2], [1000, 0.5]]
    assert found["curves"]["validation_loss"] == [[500, 0.6], [1000, 0.3]]


@pytest.mark.parametrize("missing", [LAST, HELD_OUT, SCORES])
def test_a_run_is_not_done_without_all_of_it(run, tmp_path, missing):
    write(tmp_path, *(line for line in (LAST, HELD_OUT, SCORES) if line is not missing))
    assert results.of_run(run, tmp_path) is None


def test_a_run_is_not_done_before_its_last_step_is_saved(run, tmp_path, monkeypatch):
    write(tmp_path, LAST, HELD_OUT, SCORES)
    monkeypatch.setattr(results.checkpoint, "find", lambda folder: (folder, 500))
    assert results.of_run(run, tmp_path) is None

    def none(folder):
        raise MissingError("none")

    monkeypatch.setattr(results.checkpoint, "find", none)
    assert results.of_run(run, tmp_path) is None


def test_data_without_a_score_of_its_own(run, tmp_path):
    """FID is no score: such a run is done, and has curves of its loss."""
    config = run.config.copy_and_resolve_references().unlock()
    config.data.source = "folder"
    other = suite.Run(run.row, 0, config.lock())
    write(tmp_path, LAST, HELD_OUT, {"step": 1000, "fid": 30.0})
    found = results.of_run(other, tmp_path)
    assert found["score"] is None and found["validation_loss"] == 0.3


def test_a_run_that_diverged(run, tmp_path):
    (tmp_path / worker.FAILED).write_text("Step 3: loss nan")
    assert results.of_run(run, tmp_path)["failed"] == "Step 3: loss nan"
