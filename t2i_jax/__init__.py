"""Deep fusion of a language model and a diffusion transformer for text-to-image synthesis."""

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """`t2i_jax.Pipeline`, imported when it is asked for: JAX comes with it."""
    if name == "Pipeline":
        from t2i_jax.pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module 't2i_jax' has no attribute {name!r}")
