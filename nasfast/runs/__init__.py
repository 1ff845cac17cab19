"""The run directory of a search and its records."""
