"""Loops that NumPy cannot express, compiled by Numba for the processor at hand.

The machine code is kept beside the package or, where that cannot be written, in the user's cache;
where there is neither, every process compiles anew.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from numba import njit

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Compile a function of arrays and numbers at its first call; other threads go on meanwhile."""
    try:
        made: Function = njit(cache=True, nogil=True)(function)
    except RuntimeError:  # nowhere to keep it
        made = njit(nogil=True)(function)
    return made
