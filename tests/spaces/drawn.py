"""Genotypes as hypothesis draws them."""

from hypothesis import assume
from hypothesis import strategies as st


@st.composite
def genotypes(draw, space, ops=None):
    """Any valid genotype of a space, with operations among `ops`."""
    choices = [
        draw(st.sampled_from(ops) if ops and d.head == "cell.op" else st.integers(0, d.size - 1))
        for d in space.decisions
    ]
    genotype = space.decode(choices)
    assume(space.valid(genotype))
    return genotype
