"""Shorter spinning of PyTorch's OpenMP threads; scripts import this before torch.

A thread that reaches the end of a parallel region spins until the others arrive, which keeps a core
from other programs: on a machine that is busy, training becomes several times slower. GNU's OpenMP
reads GOMP_SPINCOUNT, how often a thread spins before it sleeps (300,000 by default), once, when
torch loads it. Importing this module sets the variable and does nothing else; processes started
later inherit it. A GOMP_SPINCOUNT or OMP_WAIT_POLICY of the user's is left alone.

https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html
"""

import os
import sys
from collections.abc import MutableMapping

SPIN_COUNT = 20_000


def limit_spinning(environment: MutableMapping[str, str], platform: str = sys.platform) -> None:
    """Sets GOMP_SPINCOUNT on Linux, where PyTorch uses GNU's OpenMP, if the user set neither."""
    if platform == "linux" and "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))


limit_spinning(os.environ)
