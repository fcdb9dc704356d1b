"""What the short run takes of a grid."""

import itertools

import pytest
from grids import covering, short


@pytest.mark.parametrize("size", [1, 2])
def test_every_value_occurs_but_not_every_case(size):
    """Or each two values; the cases that were chosen stay."""
    grid = list(itertools.product("abcde", range(4), (False, True)))
    parts = [set(itertools.combinations(enumerate(case), size)) for case in grid]
    taken = covering(parts, [7, 30])
    assert {7, 30} <= set(taken)
    assert len(set(taken)) == len(taken) <= {1: 6, 2: 22}[size]
    assert set().union(*(parts[number] for number in taken)) == set().union(*parts)


def test_values_of_one_parameter():
    taken = [getattr(value, "marks", ()) == () for value in short(("a", "b", ("c", 1)), "b")]
    assert taken == [False, True, False]
