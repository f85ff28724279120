"""Records of what was measured: their schema, their files, and their frames."""

from robustbench_deq.records.frames import Frames, load

__all__ = ["Frames", "load"]
