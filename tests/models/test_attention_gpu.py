"""cuDNN's attention beside XLA's, in a process that sees the GPU; other tests see CPUs alone."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import sys
import jax, jax.numpy as jnp, numpy as np
try:
    devices = jax.devices("gpu")
except RuntimeError:
    sys.exit(77)
from t2i_jax import sharding
from t2i_jax.models.attention import attend

rng = np.random.default_rng(0)
for causal in (False, True):
    queries = keys = 256
    if not causal:
        queries = 192
    shapes = ((4, queries, 8, 128), *[(4, keys, 2, 128)] * 2)
    whole = [jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in shapes]
    lengths = np.array([[256], [200], [70], [1]])
    mask = np.arange(keys) < lengths if causal else rng.random((4, keys)) < 0.6
    weight = rng.standard_normal(shapes[0]).astype(np.float32)

    def run(kernel, dtype):
        def f(q, k, v):
            out = attend(q, k, v, mask, scale=0.1, causal=causal, kernel=kernel)
            return jnp.sum(out.astype(jnp.float32) * weight), out

        given = [x.astype(dtype) for x in whole]
        with jax.set_mesh(sharding.make_mesh()):
            (_, out), grads = jax.jit(jax.value_and_grad(f, (0, 1, 2), has_aux=True))(*given)
        return [np.asarray(x, np.float32) for x in (out, *grads)]

    with jax.default_matmul_precision("highest"):
        exact = run("xla", jnp.float32)
    for name, one, other in zip("out q k v".split(), run("cudnn", jnp.bfloat16), exact):
        error = np.abs(one - other).max() / np.abs(other).max()
        print(f"causal {causal}, {name}: {error:.1e}")
        assert error <= 2.0**-6, name
"""


def test_the_gpu_kernel_is_the_same_attention_gradients_included():
    """In bfloat16, within four steps of it of the largest; padding, causal, grouped heads."""
    hidden = ("JAX_PLATFORMS", "XLA_FLAGS", "PYTEST_XDIST_WORKER")
    env = {key: value for key, value in os.environ.items() if key not in hidden}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    if done.returncode == 77:
        pytest.skip("no NVIDIA GPU that JAX can use is here")
    assert done.returncode == 0, done.stdout + done.stderr
