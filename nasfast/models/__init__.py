"""Genotypes as networks."""
