"""Benchmarks behind `python -m retro_ops bench`; each gives rows of figures, with the machine."""
