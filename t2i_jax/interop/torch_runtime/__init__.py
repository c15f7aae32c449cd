"""The PyTorch code that travels with an export for diffusers. Nothing else here imports it.

Its modules and parameters are named as those of t2i_jax/models, whose docstrings say what they are.
"""
