"""Where a result was obtained: versions, device, threads, commit. Part of every record."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "torchvision", "torchattacks", "numpy")
PEERS = ("foolbox", "adv-lib")
"""Named where they are installed."""


def describe_environment(device: torch.device) -> dict[str, str | int | None]:
    """A flat mapping; nothing in it names the user or a path."""
    environment: dict[str, str | int | None] = {
        "robustbench_deq": _version("robustbench-deq"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "num_cpus": num_cpus(),
        "num_threads": torch.get_num_threads(),
        "commit": _commit(),
    }
    environment |= {package: _version(package) for package in PACKAGES}
    return environment | {package: version for package in PEERS if (version := _version(package)) is not None}


def merge_environments(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of several machines or moments: where they differ, the values of all are listed, such as `cpu, NVIDIA H100`."""
    merged = {}
    for key in dict.fromkeys(key for environment in found for key in environment):
        values = list(dict.fromkeys(environment.get(key) for environment in found))
        merged[key] = values[0] if len(values) == 1 else ", ".join(map(str, values))
    return merged


def num_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache  # git takes longer than a small shard, and what runs is what was imported
def _commit() -> str | None:
    """The commit of the checkout this file is in, "-dirty" if files other than results were changed since; None outside
    one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    commit = _git(root, "rev-parse", "--short=12", "HEAD")
    changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)results")
    return commit and commit + ("-dirty" if changed else "")


def _git(root: Path, *words: str) -> str | None:
    try:
        answer = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
