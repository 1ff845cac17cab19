"""What an architecture is: decisions, genotypes, canonical form, mutation. Pure Python."""

from nasfast.spaces.base import Decision, Genotype, Space
from nasfast.spaces.fast_nas import PRIMITIVES, Cell, FastNASGenotype, FastNASSpace
from nasfast.spaces.ir_nas import IRNASGenotype, IRNASSpace
from nasfast.spaces.nas_fcos import NASFCOSGenotype, NASFCOSSpace
from nasfast.spaces.template_nas import TemplateNASGenotype, TemplateNASSpace

__all__ = [
    "PRIMITIVES",
    "Cell",
    "Decision",
    "FastNASGenotype",
    "FastNASSpace",
    "Genotype",
    "IRNASGenotype",
    "IRNASSpace",
    "NASFCOSGenotype",
    "NASFCOSSpace",
    "Space",
    "TemplateNASGenotype",
    "TemplateNASSpace",
]
