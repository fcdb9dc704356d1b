"""Which cases of a grid the short run takes; conftest.py says when."""

from collections import Counter
from collections.abc import Mapping
from itertools import combinations

import pytest


def short(values, *taken):
    """Parameters, of which the short run takes these."""

    def left_out(value):
        return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.exhaustive)

    return [value if value in taken else left_out(value) for value in values]


def short_run(items):
    """The set of those test items that the short run takes."""
    kept, grids = set(), {}
    for item in items:
        if item.get_closest_marker("exhaustive"):
            continue
        if item.get_closest_marker("covering"):
            grids.setdefault(item.nodeid.split("[")[0], []).append(item)
        else:
            kept.add(item)
    for grid in grids.values():
        mark = grid[0].get_closest_marker("covering")
        wanted = [number for number, item in enumerate(grid) if item.callspec.id in mark.args]
        parts = [set(combinations(values_of(item), 2 if mark.kwargs.get("pairs") else 1)) for item in grid]
        kept.update(grid[number] for number in covering(parts, wanted))
    return kept


def values_of(item):
    """(parameter, value) for each; a dictionary counts as the parameters that it holds."""
    found = []
    for name, value in item.callspec.params.items():
        for key, part in value.items() if isinstance(value, Mapping) else [("", value)]:
            plain = isinstance(part, str | int | float | tuple | None)
            found.append((name, key, repr(part) if plain else id(part)))
    return found


def covering(parts, chosen):
    """`chosen` and further numbers of `parts`, sets, so that together they have all that any of them has."""
    chosen, number_of = list(chosen), Counter()
    for number in chosen:
        number_of.update(parts[number])
    missing = set().union(*parts) - set(number_of)
    while missing:
        # What adds most; of those, the one whose parts are least often there already.
        new = [(len(part & missing), -sum(number_of[p] for p in part)) for part in parts]
        number = max(range(len(parts)), key=new.__getitem__)
        chosen.append(number)
        number_of.update(parts[number])
        missing -= parts[number]
    return chosen
