"""Checkers for the notebooks' exercises: each says what is wrong with an answer, not just that something is."""
