"""Hostile input, made by changing good input: `python -m tests.fuzz TARGET --minutes N`."""
