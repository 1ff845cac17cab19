"""One module a subcommand of ``nasfast``: a docstring, which ``--help`` shows, and ``main``."""

COMMANDS = {
    "check": "look at data before a search: what is read, what is wrong",
    "search": "find an architecture",
    "train": "train an architecture in full",
    "study": "whether a search's rewards predict longer training; a random search beside it",
    "evaluate": "measure a trained network: score, size, latency",
    "predict": "use a trained network on images",
    "export": "write a trained network as ONNX or for torch.export, also in int8",
    "profile": "time a target's operators, so that a search elsewhere predicts its latencies",
    "report": "write the report of a search again, or beside a baseline",
    "cache": "list, verify and remove cached encoder features",
    "pretrain": "train the packaged encoder again",
    "info": "what is built, and what runs where; the zoo",
}
"""What each does, in the order of use."""
