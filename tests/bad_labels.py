"""Labels that are out of range at one position, and options of the losses that see them."""

import jax.numpy as jnp
import numpy as np
from bad_calls import LABELS, LINEAR, C, N

BAD = 2  # the position of the bad label, whose good label is C - 1
SIGNED = (-1, C, C + 7)
BAD_LABELS = {
    "int8": (*SIGNED, -128, 127),
    "int16": SIGNED,
    "int32": (*SIGNED, -(2**31), 2**31 - 1),
    # 2**32 and 2**32 + 1 are 0 and 1 in their low 32 bits.
    "int64": (*SIGNED, 2**32, 2**32 + 1, -(2**63), 2**63 - 1),
    "uint8": (C, C + 7, 255),
    "uint16": (C, C + 7),
    "uint32": (C, C + 7, 2**32 - 1),
}
# An index out of range has the weight of the class at that edge, and the weight enters the mean's denominator. Here the
# good label has the same weight, so that the gradients of the other positions can be compared.
CLASS_WEIGHT = np.array([0.5, 2.0, 1.0, 0.25, 3.0, 1.0, 0.5], np.float32)
OPTIONS = {
    "cross_entropy": {
        "plain": {},
        "smoothing": {"label_smoothing": 0.1},
        "z_loss": {"z_loss_weight": 0.1},
        "class_weight": {"class_weight": CLASS_WEIGHT},
        "all": {"label_smoothing": 0.1, "z_loss_weight": 0.1, "class_weight": CLASS_WEIGHT, "logit_softcap": 3.0},
        "stats": {"return_stats": True},
        "traced": {"label_smoothing": jnp.float32(0.1), "z_loss_weight": jnp.float32(0.1)},
        "sample_weight": {"sample_weight": np.linspace(0.5, 1.5, N, dtype=np.float32)},
    },
    "nll_loss": {
        "plain": {},
        "class_weight": {"class_weight": CLASS_WEIGHT},
        "sample_weight": {"sample_weight": np.linspace(0.5, 1.5, N, dtype=np.float32)},
    },
    LINEAR: {
        "all": {"label_smoothing": 0.1, "z_loss_weight": 0.1, "class_weight": CLASS_WEIGHT, "logit_softcap": 3.0},
    },
}
OPTION_SETS = [(function, name) for function, sets in OPTIONS.items() for name in sets]


def with_label(label, dtype):
    labels = LABELS.astype(dtype)
    labels[BAD] = label
    return jnp.asarray(labels)
