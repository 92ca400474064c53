"""Measures the machine: probes, statistics, fits and roofs."""
