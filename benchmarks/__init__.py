"""Timings, never run by pytest. Each module is one command, `python -m benchmarks.NAME`, and writes to `results/`,
but for those that commands share: `timing`, `marks`, and of the command `gpu` also `gpu_parts`, `gpu_figure`, `device`.

Seconds are only ever compared within one run: the things compared take turns, and the median of their ratios counts.
"""
