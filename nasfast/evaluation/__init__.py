"""Genotype to evaluation."""
