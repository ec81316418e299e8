"""Tiny random models and a two-process runner. For tests only."""
