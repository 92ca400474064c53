"""Measure a machine, tune speculative decoding of offloaded Mixture-of-Experts models, run it, prove it."""

__version__ = "0.1.0"
