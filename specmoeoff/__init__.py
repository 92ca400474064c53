"""Measure a machine, tune speculative decoding of offloaded Mixture-of-Experts models, run it, prove it."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specmoeoff.api import Engine, Plan, generate, load, validate

__version__ = "0.1.0"
__all__ = ["Engine", "Plan", "generate", "load", "validate"]


def __getattr__(name: str) -> Any:
    """The names of the Python API, imported when first used: the command line stays instant."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from specmoeoff import api

    return getattr(api, name)
