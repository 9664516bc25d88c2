"""Loops that NumPy cannot express, compiled by Numba for the processor at hand.

The machine code is kept beside the package or, where that cannot be written, in the user's cache;
where there is neither, every process compiles anew.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from numba import njit

Function = TypeVar("Function", bound=Callable[..., Any])
_CACHE_VERSION = 2
"""To be raised when a class that a compiled function takes is renamed: caches name it, and are read
before Numba looks whether they are stale."""
_ANY_ORDER = {"reassoc", "contract", "nsz"}


def compiled(function: Function) -> Function:
    """Compile a function of arrays and numbers at its first call; other threads go on meanwhile."""
    return _compile(function, nogil=True)


def compiled_sums(function: Function) -> Function:
    """Compile one whose sums the processor may add up in several lanes: in its own fixed order."""
    return _compile(function, nogil=True, fastmath=_ANY_ORDER)


def _compile(function: Function, **how: Any) -> Function:
    # part of the names of the cache's files
    function.__qualname__ += f"_v{_CACHE_VERSION}"
    try:
        made: Function = njit(cache=True, **how)(function)
    except RuntimeError:  # nowhere to keep it
        made = njit(**how)(function)
    return made
