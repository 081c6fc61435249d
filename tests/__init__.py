"""Tests of jaxrl_stable; helpers are imported by package, as `tests.…`."""

from collections.abc import Callable


def typechecked(function: Callable) -> Callable:
    """The type checker of `--jaxtyping-packages=jaxrl_stable,tests.typechecked`.

    As in PEP 484, it accepts an int where a float is annotated.
    """
    import beartype

    return beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))(function)
