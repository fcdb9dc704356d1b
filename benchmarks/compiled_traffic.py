"""What one step reads, writes and multiplies on a TPU chip, from compiled programs: `compiled.py traffic`.

Bytes are operands and results of each fusion in HBM, and those of a loop count as often as it turns. Of flops only
multiplications of matrices count. "At least" is the larger of flops / peak and bytes / bandwidth: a lower bound of a
model, and no measurement.
"""

from functools import partial

import jax
import jax.numpy as jnp
from hlo import Program
from peers import linear_losses, logits_losses
from platforms import ONE_LOOP, arguments, compiled, on, temporaries, tpus
from report import MIB, reason, table

import jxent

# Topology, bfloat16 flops per second, bytes per second, of one chip: docs.cloud.google.com/tpu/docs/v5e, v6e and v5p.
CHIPS = {
    "v5e": ("v5e:2x2", 197e12, 819e9),
    "v6e": ("v6e:2x2", 918e12, 1638e9),
    "v5p": ("v5p:2x2x1", 459e12, 2765e9),
}


HEADS = ("", "temporaries", "of full logits", "accessed", "flops", "at least")


def traffic(platform, smoke):
    if platform != "tpu":
        raise SystemExit("traffic is read from programs of the TPU's compiler: --platform tpu")
    positions, features, vocab = size = (1024, 128, 5003) if smoke else (8192, 2048, 151936)
    full = 2 * positions * vocab
    print(f"{positions} positions, {features} features, {vocab} classes, bfloat16; value and gradients of the mean")
    print(f"Full logits: {full / MIB:,.0f} MiB in bfloat16, {full / MIB * 2:,.0f} in float32")
    hidden, kernel, labels = arguments(*size, jnp.bfloat16)
    logits = jax.ShapeDtypeStruct((positions, vocab), jnp.bfloat16)
    for chip in ("v5e",) if smoke else CHIPS:
        device = tpus(CHIPS[chip][0])[0]
        with on(device):
            of_hidden = linear_losses()
        of_hidden["jxent"] = partial(jxent.linear_cross_entropy, **ONE_LOOP)
        of_hidden["jxent, 256 positions"] = partial(of_hidden["jxent"], block_size=256)
        for title, losses, args, wrt in (
            ("hidden states and kernel", of_hidden, (hidden, kernel, labels), (0, 1)),
            ("hidden states; the kernel is frozen", of_hidden, (hidden, kernel, labels), (0,)),
            ("logits, given", logits_losses(), (logits, labels), (0,)),
        ):
            print(f"\n{device.device_kind}, with respect to: {title}")
            names = list(losses)[: 2 if smoke else None]
            table(HEADS, ((name, *cells(losses[name], args, wrt, chip, device, full)) for name in names))


def cells(loss, args, wrt, chip, device, full):
    """Of one program; `full` is the size of the logits."""
    _, peak, bandwidth = CHIPS[chip]
    try:
        made = compiled(jax.value_and_grad(loss, wrt), args, device)
    except Exception as error:  # whatever a peer raises is its result
        return [reason(error).replace("|", "/")[:160], "", "", "", ""]
    held, program = temporaries(made), Program(made.as_text())
    memory = [f"{held / MIB:,.1f} MiB", f"{held / full:.1%}"]
    if program.kernels():
        return [*memory, "in a kernel", "in a kernel", ""]
    work = program.work()
    milliseconds = 1e3 * max(work.flops / peak, work.bytes / bandwidth)
    return [*memory, f"{work.bytes / 1e9:,.1f} GB", f"{work.flops / 1e12:.2f} T", f"{milliseconds:.1f} ms"]
