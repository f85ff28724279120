"""Judging, recording and running: what turns an attack's proposal into a number others can believe."""

from robustbench_deq.bench.frames import Frames, load

__all__ = ["Frames", "load"]
