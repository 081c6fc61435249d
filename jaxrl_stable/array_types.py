"""Array types for the signatures of modules that need only jax and numpy.

Static type checkers see jaxtyping's types. These are also used at run time if the process has
already imported jaxtyping, whose import hook then checks every shape. Importing a loss never
imports jaxtyping; without it, `Float[Array, "B T"]` is an annotated `Array`.
"""

import sys
from typing import TYPE_CHECKING, Annotated

import jax
import numpy as np

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from jaxtyping import Bool, Float, Int, Num, Shaped
else:
    Bool = Float = Int = Num = Shaped = Annotated

Array = jax.Array | np.ndarray | np.generic  # accepted by jax.numpy; results are JAX arrays
