"""Memory of the process: what the allocator does with freed memory, and the collector of cycles."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator

# Parameters of glibc's mallopt(3), from its header malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 2**30
_LARGEST_FROM_HEAP = 2**25  # glibc accepts no more


def keep_freed_memory() -> bool:
    """Let the C library keep up to a gigabyte of freed memory for the next tensors; say whether it agreed.

    By default glibc hands memory above a small limit back to the system when it is freed, and on a CPU every step then
    pays the page faults of all its tensors again. A setting of the whole process, for programs to make, never done on
    import. Without effect on other C libraries and on devices.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)) and bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_FROM_HEAP))


def release_freed_memory() -> None:
    """Hand memory that is kept but not in use back to the system, so that one run's does not count as the next one's.

    Costs the page faults that keeping it has spared: for between runs, not for between batches.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Without Python's collector of cycles, which looks at all objects again and again while many are made and kept."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
