"""Measuring a model: what its pictures show, and how good they are."""
