"""Configuration: training arguments and Transformer bodies."""
