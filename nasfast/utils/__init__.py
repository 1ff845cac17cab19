"""Files, configuration, seeds, signals and the command line: what everything else stands on."""
