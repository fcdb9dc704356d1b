"""Bad names of mesh axes raise where no axis is in scope.

test_sharding_named_axes.py has the errors on a mesh, and test_sharding_shard_map.py those inside `jax.shard_map`.
"""

import jax
from bad_calls import BINARY, MEAN_TAKERS, SOFTMAXES, assert_raises, each_row, rows_of


def axis_rows(function, argument):
    scope = "names no axis in scope"
    return rows_of(
        function,
        argument,
        ("unknown", "vocab", ValueError, f"='vocab' {scope}"),
        ("unknown-tuple", ("a", "b"), ValueError, scope),
        ("twice", ("a", "a"), ValueError, "must not name an axis twice", "got"),
        ("integer", 0, TypeError, "must be the name of a mesh axis", "got 0"),
        ("spec-in-tuple", (jax.sharding.PartitionSpec("a"),), TypeError, "must be the name of a mesh axis", "got"),
        ("unhashable", {"a": 1}, TypeError, "must be the name of a mesh axis", "got"),
    )


ROWS = [row for function in (*SOFTMAXES, "next_token_labels", *MEAN_TAKERS) for row in axis_rows(function, "axis_name")]
ROWS += [row for function in (*MEAN_TAKERS, BINARY) for row in axis_rows(function, "batch_axis_name")]


@each_row(ROWS)
def test_raises(row, how):
    assert_raises(row, how)
