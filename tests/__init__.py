"""The tests mirror t2i_jax/; tiny.py has the models and configs that several of them use."""
