"""Type aliases for NumPy arrays."""

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Pixels = NDArray[np.uint8]
"""The levels of an image, usually (H, W, 3)."""
