"""One TOML file per board: what the target can do and how to train on it.

The package holds data only; ``edgetrain.devices`` reads and checks it. Adding a
board means adding one file here and nothing else.
"""
