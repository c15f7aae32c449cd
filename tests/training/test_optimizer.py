"""Schedules written out, AdamW in NumPy, and what Muon does to which parameters."""

from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.sharding import Named
from t2i_jax.training import optimizer
from tests import tiny

MATRICES = {  # of a block: (axes in, axes out), after the axis of the layers
    "blocks/attention/q/weight": ((1,), (2, 3)),
    "blocks/attention/k/weight": ((1,), (2, 3)),
    "blocks/attention/v/weight": ((1,), (2, 3)),
    "blocks/attention_out/weight": ((1, 2), (3,)),
    "blocks/mlp/gate/weight": ((1,), (2,)),
    "blocks/mlp/up/weight": ((1,), (2,)),
    "blocks/mlp/down/weight": ((1,), (2,)),
}


def section(**changes):
    return tiny.config(**{f"optimizer__{k}": v for k, v in changes.items()}).optimizer


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"schedule": "constant", "warmup_steps": 4}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]),
        ({"schedule": "constant", "warmup_steps": 1}, [1] * 10),
        ({"schedule": "linear", "warmup_steps": 0}, [1 - i / 10 for i in range(10)]),
        (
            {"schedule": "linear", "warmup_steps": 2},
            [0.5, 1, *(1 - i / 8 for i in range(8))],
        ),
        (
            {"schedule": "linear", "warmup_steps": 2, "decay_steps": 4},
            [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25],
        ),
        (
            {"schedule": "cosine", "warmup_steps": 0, "decay_steps": 5},
            [1] * 5 + [(1 + np.cos(np.pi * i / 5)) / 2 for i in range(5)],
        ),
    ],
)
def test_schedules_are_literal(changes, expected):
    """Of ten steps; a decay would be at zero after the last one."""
    rate = optimizer.schedule(0.3, section(**changes), 10)
    np.testing.assert_allclose([rate(i) for i in range(10)], 0.3 * np.array(expected), rtol=1e-6)
    assert rate(10) == pytest.approx(0.0 if changes["schedule"] != "constant" else 0.3)


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"optimizer\.schedule = 'step'.*constant.*linear.*cosine"):
        optimizer.schedule(1.0, section(schedule="step"), 10)
    with pytest.raises(ValueError, match=r"optimizer\.name = 'sgd'.*adamw.*muon"):
        optimizer.make(section(name="sgd"), 10, {})


def gradients(params, seed):
    rng = np.random.default_rng((seed, 4))
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), params)


def test_adamw_is_numpys():
    """Two parameters, three steps; the first gradient is clipped, the others are not."""
    c = section(
        name="adamw", learning_rate=0.1, weight_decay=0.3, clip_norm=2.0, b1=0.8, b2=0.95, eps=1e-3
    )
    names = {"a": Named(jnp.zeros((3, 4)), ("embed", "mlp")), "b": Named(jnp.zeros(5), ("norm",))}
    update, rate = optimizer.make(c, 10, names)
    shapes = {"a": np.zeros((3, 4)), "b": np.zeros(5)}
    params = gradients(shapes, 9)
    opt_state, expected = update.init(params), {k: np.float64(v) for k, v in params.items()}
    m = {k: 0.0 for k in shapes}
    v = {k: 0.0 for k in shapes}
    for i, size in enumerate((50.0, 0.1, 0.2)):
        grads = jax.tree.map(lambda g, size=size: size * g, gradients(shapes, i))
        updates, opt_state = update.update(grads, opt_state, params)
        params = jax.tree.map(jnp.add, params, updates)
        norm = np.sqrt(sum((np.float64(g) ** 2).sum() for g in grads.values()))
        assert (norm > 2.0) == (i == 0)
        for k, g in grads.items():
            g = np.float64(g) / max(norm / 2.0, 1.0)
            m[k] = 0.8 * m[k] + 0.2 * g
            v[k] = 0.95 * v[k] + 0.05 * g**2
            step = m[k] / (1 - 0.8 ** (i + 1)) / (np.sqrt(v[k] / (1 - 0.95 ** (i + 1))) + 1e-3)
            expected[k] -= rate(i) * (step + 0.3 * expected[k])
        tiny.close(params, expected)
    np.testing.assert_allclose([rate(0), rate(1), rate(2)], [0.05, 0.1, 0.1])


def test_muon_takes_the_matrices_of_the_blocks_and_nothing_else():
    boxed = tiny.run().boxed["dit"]
    dimensions = flatten_dict(optimizer.matrix_dimensions(boxed), sep="/")
    taken = {
        path: (tuple(d.reduction_axis), tuple(d.output_axis))
        for path, d in dimensions.items()
        if d is not None
    }
    assert taken == MATRICES
    left = {path for path, d in dimensions.items() if d is None}
    assert {"patch_embed/weight", "out/weight", "blocks/modulation/linear/weight"} <= left
    assert {f"time_embed/time/{name}/weight" for name in ("hidden", "out")} | {
        "blocks/q_norm/weight"
    } <= left


def test_muon_orthogonalises_each_layers_matrix():
    """Singular values of an update are about one, times the rate and sqrt(outputs / inputs)."""
    run = tiny.run(optimizer__muon_learning_rate=0.01, optimizer__learning_rate=0.003)
    params = run.state.params
    grads = gradients(params, 0)
    run.config.unlock().optimizer.update(weight_decay=0.0, warmup_steps=0, clip_norm=1e9)
    update, _ = optimizer.make(run.config.optimizer, 10, run.boxed)
    updates, _ = jax.jit(update.update)(grads, update.init(params), params)
    flat = flatten_dict(updates["dit"], sep="/")
    flat_grads = flatten_dict(grads["dit"], sep="/")
    for path, change in flat.items():
        change = np.float64(change)
        if path not in MATRICES:  # the first step of NAdam: the gradient's sign, looking ahead
            ahead = 1 + 0.9 * (1 - 0.9) / (1 - 0.9**2)
            sign = np.sign(flat_grads[path])
            np.testing.assert_allclose(change, -0.003 * ahead * sign, rtol=1e-3)
            continue
        rows = int(np.prod([change.shape[i] for i in MATRICES[path][0]]))
        for layer, grad in zip(change, flat_grads[path], strict=True):
            matrix, grad = layer.reshape(rows, -1), np.float64(grad).reshape(rows, -1)
            scale = 0.01 * np.sqrt(max(1.0, matrix.shape[1] / matrix.shape[0]))
            values = np.linalg.svd(matrix / scale, compute_uv=False)
            assert values.min() > 0.5 and values.max() < 1.35, (path, values)
            u, _, vt = np.linalg.svd(grad, full_matrices=False)
            along = np.diag(u.T @ (matrix / scale) @ vt.T)  # the nearest orthogonal one is u vt
            assert along.min() > -1.35 and along.max() < -0.5, path


def test_more_steps_of_muon_come_closer_to_an_orthogonal_matrix():
    run = tiny.run(optimizer__muon_learning_rate=0.01)
    params, grads = run.state.params, gradients(run.state.params, 0)
    spread = {}
    for steps in (1, 5):
        run.config.unlock().optimizer.update(
            weight_decay=0.0, warmup_steps=0, clip_norm=1e9, muon_steps=steps
        )
        update, _ = optimizer.make(run.config.optimizer, 10, run.boxed)
        updates, _ = jax.jit(update.update)(grads, update.init(params), params)
        matrix = np.float64(updates["dit"]["blocks"]["mlp"]["gate"]["weight"][0])
        values = np.linalg.svd(matrix, compute_uv=False)
        spread[steps] = values.max() / values.min()
    assert spread[5] < 2.8 < spread[1] / 2


def test_muon_decays_weights_with_the_rate_of_each_kind():
    rates = {"matrix": 0.02, "table": 0.01}
    c = section(warmup_steps=0, muon_learning_rate=0.02, learning_rate=0.01, weight_decay=0.5)
    axes = {"matrix": ("embed", "mlp"), "table": ("vocab", "embed")}
    params = gradients({name: np.zeros((3, 4)) for name in axes}, 0)
    boxed = {name: Named(params[name], axes[name]) for name in axes}
    zero, (update, _) = jax.tree.map(jnp.zeros_like, params), optimizer.make(c, 10, boxed)
    updates, _ = jax.jit(update.update)(zero, update.init(params), params)
    tiny.close(updates, {name: -rates[name] * 0.5 * x for name, x in params.items()})
