"""What Weights & Biases is told, by a module in its place."""

import importlib.util
import json
import sys
import types

import numpy as np
import pytest

from t2i_jax.errors import MissingError, UserError
from t2i_jax.training import loop, wandb_log
from t2i_jax.training.metrics import MetricWriter
from tests import tiny


class Fake(types.ModuleType):
    """As much of wandb as is used.

    Attributes:
      runs: what each run was started with, told, and ended with.
    """

    class Error(Exception):
        pass

    def __init__(self, fails=""):
        super().__init__("wandb")
        self.runs, self._fails = [], fails

    def Image(self, array):
        return "image", array.shape

    def init(self, **options):
        if self._fails:
            raise self.Error(self._fails)
        self.runs.append(run := types.SimpleNamespace(options=options, told=[], ended=[]))
        run.define_metric = lambda name, step_metric: run.told.append((name, step_metric))
        run.log = run.told.append
        run.finish = lambda exit_code: run.ended.append(exit_code)
        return run


@pytest.fixture
def fake(monkeypatch):
    module = Fake()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_it_is_told_what_tensorboard_is(fake, tmp_path):
    config = tiny.config(train__wandb="scenes")
    writer = MetricWriter(tmp_path, 0, wandb_log.WandbLog(config, tmp_path))
    writer.scalars(3, {"loss": np.float32(0.5)})
    writer.speed(3, {"mfu": 0.4})
    writer.image(4, "samples", np.zeros((2, 5, 3), np.uint8))
    writer.close(finished=False)
    writer.close(finished=False)
    (run,) = fake.runs
    assert run.told == [
        ("*", "step"),
        {"step": 3, "loss": 0.5},
        {"step": 3, "speed/mfu": 0.4},
        {"step": 4, "samples": ("image", (2, 5, 3))},
    ]
    assert run.ended == [1]
    assert run.options["project"] == "scenes" and run.options["name"] == "tiny"
    assert run.options["config"]["dit.width"] == 24 and run.options["dir"] == str(tmp_path)


def test_a_run_that_is_started_again_is_the_same_one(fake, tmp_path):
    for project in ("scenes", "scenes", "others"):
        wandb_log.WandbLog(tiny.config(train__wandb=project), tmp_path).close(finished=True)
    ids = [run.options["id"] for run in fake.runs]
    assert ids[0] == ids[1] != ids[2]
    assert json.loads((tmp_path / "wandb.json").read_text())["id"] == ids[2]
    assert {run.options["resume"] for run in fake.runs} == {"allow"}
    assert [run.ended for run in fake.runs] == [[0]] * 3


def test_what_wandb_refuses_is_told_with_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", Fake(fails="no API key."))
    with pytest.raises(UserError, match=r"train\.wandb = 'p': no API key\. Log in .* WANDB_MODE"):
        wandb_log.WandbLog(tiny.config(train__wandb="p"), tmp_path)


def test_where_it_is_not_installed_the_run_does_not_start(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "wandb" else find(n))
    with pytest.raises(MissingError, match=r"wandb is not installed: pip install wandb"):
        loop.train(tiny.config(train__wandb="p"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    wandb_log.check("")
