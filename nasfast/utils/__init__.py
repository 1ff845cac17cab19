"""Files, configuration, seeds, signals, memory, the command line: what all else stands on."""
