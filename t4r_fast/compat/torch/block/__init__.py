"""Blocks of a model's body."""
