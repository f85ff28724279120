"""Peak memory, and memory that the allocator keeps; settings of a whole process are tried in one of its own."""

from __future__ import annotations

import gc
import os
import platform
import subprocess
import sys

import pytest
import torch

from robustbench_deq import memory, peak_memory

CPU = torch.device("cpu")
FAULTS = """
import resource, sys, torch
from robustbench_deq.memory import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def fill():
    tensors = [torch.ones(2**20) for _ in range(8)]
for _ in range(5):  # until the heap has its size
    fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str, source: str = FAULTS) -> int:
    # By itself glibc moves its limits as it goes; fixed ones hand every tensor back.
    limits = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    command = [sys.executable, "-c", source, mode]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | limits)
    return int(answer.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_kept_memory_is_used_again_without_page_faults() -> None:
    # 8 tensors of 4 MiB: up to 8192 pages a turn when they are handed back and asked for anew.
    assert faults("keep") < 0.1 * faults("default")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_kept_memory_is_handed_back_only_when_asked() -> None:
    """The meter is opened for every batch, and must leave kept memory alone."""
    ask = "from robustbench_deq.memory import release_freed_memory\n"
    ask += "from robustbench_deq.peak_memory import reset_peak_memory\n"
    between = {"release": "release_freed_memory(); fill()", "reset": "reset_peak_memory(torch.device('cpu')); fill()"}
    found = {}
    for name, calls in between.items():
        source = ask + FAULTS.replace("for _ in range(20):\n    fill()", f"for _ in range(20):\n    {calls}")
        found[name] = faults("keep", source)
    assert found["reset"] < 0.1 * found["release"]


def test_a_library_without_the_setting_is_no_error(monkeypatch) -> None:
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    assert memory.keep_freed_memory() is False
    memory.release_freed_memory()


def test_peak_rises_with_what_is_used_and_falls_after_a_reset() -> None:
    memory.release_freed_memory()  # what earlier tests have left would be used again
    peak_memory.reset_peak_memory(CPU)
    before = peak_memory.peak_memory_mb(CPU)
    tensor = torch.ones(64 * 2**18)  # 64 MiB
    assert peak_memory.peak_memory_mb(CPU) > before + 50
    del tensor
    memory.release_freed_memory()
    peak_memory.reset_peak_memory(CPU)
    assert peak_memory.peak_memory_mb(CPU) < before + 30


def test_the_collector_rests_and_is_left_as_it_was() -> None:
    with memory.no_collection():
        assert not gc.isenabled()
        with memory.no_collection():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
