"""The count of the model's FLOPs, against formulas and XLA's count of a step without loops."""

import jax
import jax.numpy as jnp
import pytest

from configs import base
from t2i_jax import build, flops, sharding
from t2i_jax.training import program


def test_products_loops_and_convolutions():
    def f(x, w, image, kernel):
        x, _ = jax.lax.scan(lambda x, w: (x @ w, None), x, w)
        layout = ("NHWC", "HWIO", "NHWC")
        image = jax.lax.conv_general_dilated(image, kernel, (1, 1), "SAME", None, None, layout)
        return jax.jit(lambda x: jnp.einsum("bd,cd->bc", x, x))(x), image

    like = jax.ShapeDtypeStruct
    shapes = ((3, 8), (5, 8, 8), (2, 7, 7, 4), (3, 3, 4, 6))
    found = flops.count(f, *(like(shape, jnp.float32) for shape in shapes))
    assert found == 5 * 2 * 3 * 8 * 8 + 2 * 3 * 3 * 8 + 2 * (2 * 7 * 7 * 6) * (3 * 3 * 4)


def test_the_flagship_by_hand():
    """2 FLOPs a weight and token, 4 a pair of query and key and channel, 18 layers."""
    config = base.get_config().unlock()
    config.dit.conditioning = "none"
    found = flops.forward(config)
    weights = 2048 * 2048 * 2 + 2 * 2048 * 256 + 3 * 2048 * 16384
    edge = 2 * 1024 * 2 * (4 * 16 * 2048)
    assert found["dit"] == 18 * (2 * 1024 * weights + 4 * 1024 * 1280 * 2048) + edge
    assert found["llm"] == 18 * (2 * 256 * weights + 4 * 256 * 256 * 2048)
    step = flops.train_step(config)
    assert step["dit"] == 512 * 3 * found["dit"] and step["llm"] == 512 * found["llm"]
    assert "autoencoder" not in flops.train_step(config, latents=True)
    half = flops.train_step(config, 128)["llm"]
    assert half < 0.5 * step["llm"]
    drawn = flops.sample(config, 4, 25)
    assert drawn["dit"] == 4 * 25 * 2 * found["dit"] and drawn["llm"] == 5 * found["llm"]


@pytest.mark.parametrize(
    "source, attention, rank",
    [
        ("deep", "joint", 0),
        ("shallow", "cross", 0),
        ("shallow", "cross", 16),
    ],
)
def test_a_step_is_what_xla_counts_without_loops(source, attention, rank):
    """Within 2%, at widths where what is element by element is small."""
    config = base.get_config().unlock()
    config.weights.autoencoder = ""
    config.autoencoder.update(kind="identity", channels=3, downsample=1)
    config.llm.update(vocab_size=64, width=512, num_layers=2, num_heads=2, mlp_width=2048)
    config.llm.unroll = config.dit.unroll = 2
    config.dit.update(width=512, num_layers=2, mlp_width=2048, attention=attention, remat="none")
    config.memory.source, config.lora.rank = source, rank
    config.data.update(image_size=32, max_text_tokens=64)
    config.train.update(dtype="float32", frozen_dtype="float32", batch_size=2, attention="xla")
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    programs = program.make(config, mesh, build.make_autoencoder(config))
    with jax.set_mesh(mesh):
        compiled = programs.train_step.lower(
            programs.state,
            build.abstract_frozen(config, mesh),
            program.abstract_batch(config, mesh),
            build.abstract_key(mesh),
        ).compile()
    parameters = build.count(programs.state.params)
    theirs = compiled.cost_analysis()["flops"]
    ours = sum(flops.train_step(config).values())
    assert 2 * parameters < 0.02 * ours  # what the optimiser does is small beside it
    assert theirs == pytest.approx(ours, rel=0.02)
