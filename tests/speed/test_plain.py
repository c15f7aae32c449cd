"""The step by hand computes what the framework's does: two ways to the same numbers."""

import jax
import numpy as np
import pytest

from t2i_jax.errors import ConfigError
from t2i_jax.speed import plain
from tests import tiny

CHANGES = {
    "optimizer__name": "adamw",
    "optimizer__warmup_steps": 0,
    "optimizer__learning_rate": 1e-2,
    "optimizer__eps": 1e-2,  # or the sign of a gradient that is all rounding would be an update
    "optimizer__weight_decay": 0.1,
    "optimizer__clip_norm": 0.1,
    "ema__every": 1,
    "flow__time_mean": 0.3,
    "flow__time_std": 0.8,
    "autoencoder__scale": 1.3,
    "autoencoder__shift": 0.2,
}


def test_losses_and_weights_of_several_steps():
    run = tiny.run(**CHANGES)  # a DiT of two layers, an LLM of three
    key, ours = jax.random.key(7), run.state
    theirs = plain.create(ours.params)
    steps = jax.jit(run.train_step()), jax.jit(plain.make_train_step(run.config))
    for _ in range(3):
        ours, expected = steps[0](ours, run.frozen, run.batch, key)
        theirs, found = steps[1](theirs, run.frozen, run.batch, key)
        tiny.close(found, expected, 2e-5)
        assert expected["grad_norm"] > 2 * run.config.optimizer.clip_norm
    adam = ours.opt_state[1][0]
    both = {"params": ours.params, "ema": ours.ema, "mu": adam.mu, "nu": adam.nu}
    for name in both:  # gradients that nearly cancel have fewer digits
        tiny.close(theirs[name], both[name], 1e-3 if name in ("mu", "nu") else 1e-5)
    assert theirs["step"] == ours.step == 3
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), ours.params, run.state.params)
    assert min(jax.tree.leaves(moved)) > 1e-3


def test_another_kind_of_step_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"optimizer.name = 'muon': .* one of 'adamw'"):
        plain.make_train_step(tiny.config())
    with pytest.raises(ConfigError, match=r"dit\.attention"):
        plain.check(tiny.config(**CHANGES, dit__attention="cross"))
