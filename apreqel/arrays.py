"""Names for numpy's arrays by what they hold."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Reals = npt.NDArray[np.floating]  # of any width
Bytes = npt.NDArray[np.uint8]
Tokens = npt.NDArray[np.int32]  # and experts, by number
Whole = npt.NDArray[np.intp]
Mask = npt.NDArray[np.bool_]
