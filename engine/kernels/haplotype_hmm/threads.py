"""Compiled functions over a range of work, shared out to Python threads.

Such functions release the interpreter's lock. Numba's own parallel loops come to the same speed, but are compiled over and
over with all that they call: the first use of this room took 86 CPU seconds with them, and 40 without.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba

from engine.kernels.haplotype_hmm import denormals


def in_threads(function: Callable[..., Any], count: int, *arguments: Any, chunk: int = 0) -> None:
    """function(begin, end, *arguments) until 0 .. count-1 is done, on numba.get_num_threads() threads.

    Pieces of `chunk` are handed out as threads come free; 0 makes a few for each thread. Which thread does what must not
    matter to the result. Denormal numbers are taken as 0.
    """

    def part(begin: int, end: int) -> None:
        before = denormals.flush()
        try:
            function(begin, end, *arguments)
        finally:
            denormals.restore(before)

    threads = min(numba.get_num_threads(), count)
    if threads <= 1:
        part(0, count)
        return
    step = chunk or max(1, count // (4 * threads))
    with ThreadPoolExecutor(threads) as pool:
        begins = range(0, count, step)
        for done in [pool.submit(part, begin, min(begin + step, count)) for begin in begins]:
            done.result()
