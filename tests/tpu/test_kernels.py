"""The attention kernel compiles for every chip, in the shapes of the flagship: `make tpu`."""

import os
from pathlib import Path
import subprocess
import sys

import pytest

from t2i_jax import xla_flags

ROOT = Path(__file__).parent.parent.parent
# libtpu reads its flags once, so each chip has a process of its own.
COMPILE = """
import sys

from t2i_jax import machines, sharding

device, *_ = machines.devices(machines.parse(sys.argv[1]))
import jax
import jax.numpy as jnp

from t2i_jax.models import attention_tpu

mesh = sharding.make_mesh(1, 1, 1, devices=[device])


def compile_(queries, keys, width, dtype, gradient):
    def total(q, k, v, mask):
        out = attention_tpu.attend(q, k, v, mask, scale=0.1, causal=False, softcap=0.0)
        return out.astype(jnp.float32).sum()

    place = sharding.batch_sharding(mesh)
    like = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    rows, key = (2, keys, 1, width), (2, keys)
    arrays = like((2, queries, 8, width), dtype), like(rows, dtype), like(rows, dtype)
    function = jax.grad(total, (0, 1, 2)) if gradient else total
    with jax.set_mesh(mesh):
        jax.jit(function).lower(*arrays, like(key, bool)).compile()
    print("compiled", queries, keys, width, jnp.dtype(dtype).name, flush=True)


compile_(4096, 4096, 512, jnp.float32, False)  # the autoencoder
compile_(1024, 1280, 256, jnp.bfloat16, True)  # the DiT
"""
MACHINES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
MACHINES["tpu7x"] = "tpu7x:2x2x1"


@pytest.mark.parametrize("chip", xla_flags.CHIPS)
def test_it_has_room_in_fast_memory(chip):
    command = [sys.executable, "-c", COMPILE, MACHINES[chip]]
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.stdout.count("compiled") == 2, done.stderr[-3000:]
