"""Benchmarks of the kernels and the samplers; results are checked before they are timed. `python -m bench` runs all."""
