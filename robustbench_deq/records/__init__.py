"""Records of what was measured: their schema, their files, and their frames."""

from robustbench_deq.records.frames import Frames, read_frames

__all__ = ["Frames", "read_frames"]
