"""Anchor-free detectors: pyramids and heads (NAS-FCOS, CVPR 2020)."""
