"""Compiled loops over lanes of samples: arrays in, arrays out, no policy. Meaning is in ``reference.py``."""
