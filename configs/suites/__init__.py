"""Suites: lists of configs that are trained and compared together (launch/study.py)."""
