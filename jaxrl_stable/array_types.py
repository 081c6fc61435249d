"""Array types for the signatures of modules that need jax and numpy alone.

They are jaxtyping's for static type checkers, and at run time if the process has imported
jaxtyping already: its import hook then checks every shape. Importing a loss never imports
jaxtyping, and without it `Float[Array, "B T"]` is an annotated `Array`.
"""

import sys
from typing import TYPE_CHECKING, Annotated

import jax
import numpy as np

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from jaxtyping import Bool, Float, Int, Num, Shaped
else:
    Bool = Float = Int = Num = Shaped = Annotated

Array = jax.Array | np.ndarray | np.generic  # what jax.numpy takes; results are JAX arrays
