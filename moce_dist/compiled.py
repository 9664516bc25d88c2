"""Loops that NumPy cannot express, compiled by Numba for the processor at hand.

The machine code is cached beside the package or, where that is not writable, in the user's cache
folder. Where neither is writable, every process compiles anew.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from numba import njit

Function = TypeVar("Function", bound=Callable[..., Any])
_CACHE_VERSION = 2
"""Raise it when a class that a compiled function takes is renamed: cache files name the class, and
Numba reads them before it checks whether they are stale."""
_ANY_ORDER = {"reassoc", "contract", "nsz"}


def compiled(function: Function) -> Function:
    """Compile a function of arrays and numbers at its first call; calls release the GIL."""
    return _compile(function, nogil=True)


def compiled_sums(function: Function) -> Function:
    """Compile as `compiled`, but let sums be vectorised: reordered, in an order that is fixed."""
    return _compile(function, nogil=True, fastmath=_ANY_ORDER)


def _compile(function: Function, **how: Any) -> Function:
    # Numba puts the qualified name into the names of its cache files
    function.__qualname__ += f"_v{_CACHE_VERSION}"
    try:
        made: Function = njit(cache=True, **how)(function)
    except RuntimeError:  # nowhere to keep it
        made = njit(**how)(function)
    return made
