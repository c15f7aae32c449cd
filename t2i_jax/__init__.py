"""Deep fusion of a language model and a diffusion transformer for text-to-image synthesis."""

__version__ = "0.1.0"
