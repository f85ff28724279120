"""Peak memory of the device, or of the process on a CPU."""

from __future__ import annotations

import contextlib
import re
import resource
from pathlib import Path

import torch


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory_mb` start over where the system can: on CUDA, and on the CPU under Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb(device: torch.device) -> float:
    """Peak megabytes since the last reset: allocated on the device, or resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with contextlib.suppress(OSError):
        found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
        if found:
            return int(found[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
