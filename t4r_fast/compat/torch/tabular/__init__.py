"""Dictionaries of columns: what transforms them, what joins them to one tensor, what nests them."""
