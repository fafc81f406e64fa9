"""Heads, prediction tasks and the model around them."""
