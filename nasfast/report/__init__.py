"""What a search found: a page to open in a browser, and a table for the terminal."""

from nasfast.report.base import MethodReport, Section
from nasfast.report.correlation import correlation_table
from nasfast.report.page import write_report
from nasfast.report.ranking import terminal_table

__all__ = ["MethodReport", "Section", "correlation_table", "terminal_table", "write_report"]
