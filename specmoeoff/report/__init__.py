"""Figures, tables and the one-file HTML report."""

from specmoeoff.report.write import write_report

__all__ = ["write_report"]
