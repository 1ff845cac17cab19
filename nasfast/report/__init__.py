"""What a search found: a page to open in a browser, and a table for the terminal."""

from nasfast.report.page import terminal_table, write_report

__all__ = ["terminal_table", "write_report"]
