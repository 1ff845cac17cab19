"""Detection of objects: targets, losses, post-processing, scores."""
