"""Timings, never run by pytest. Each module is one command, `python -m benchmarks.NAME`, and writes to `results/`.

Seconds are only ever compared within one run: the things compared take turns, and the median of their ratios counts.
"""
