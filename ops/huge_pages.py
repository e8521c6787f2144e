"""Huge pages for tensors that are read from end to end again and again, such as weights."""

import ctypes
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

SIZE_FILE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")  # bytes
MADV_COLLAPSE = 25  # of Linux 6.1
GAP = 1 << 14  # bytes: tensors as near as this were allocated one behind the other


def use_huge_pages(tensors: Iterable[torch.Tensor]) -> None:
    """Moves the memory of CPU tensors to huge pages where it lies: addresses and values stay.

    A processor finds such memory with far fewer look-ups, and reads ahead across its small pages.
    What the system has no page for stays as it is; so does everything on other systems than Linux.
    """
    try:
        size = int(SIZE_FILE.read_text())
    except (OSError, ValueError):
        return
    if sys.platform != "linux":
        return
    spans: list[list[int]] = []
    for start, end in sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors):
        if spans and start <= spans[-1][1] + GAP:
            spans[-1][1] = max(end, spans[-1][1])
        else:
            spans.append([start, end])
    for start, end in spans:
        first, last = -(-start // size) * size, end // size * size
        if last > first:
            address, length = ctypes.c_void_p(first), ctypes.c_size_t(last - first)
            ctypes.CDLL(None).madvise(address, length, MADV_COLLAPSE)
