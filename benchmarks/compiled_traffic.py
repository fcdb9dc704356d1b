"""What one step reads, writes and multiplies on a chip, from compiled programs: `compiled.py traffic`.

Bytes are operands and results of each fusion in HBM, and those of a loop count as often as it turns. Of flops only
multiplications of matrices count. "At least" is the larger of flops / peak and bytes / bandwidth. "One by one" is the
sum over all kernels, each as long as its own flops or bytes take: nothing runs beside another. Both are bounds of a
model, and no measurements.
"""

import jax
import jax.numpy as jnp
from h100 import CUBLAS
from hlo import Program
from peers import linear_losses, logits_losses
from platforms import ONE_LOOP, arguments, compiled, h100s, linear, on, temporaries, tpus
from report import MIB, reason, table

# Topology, bfloat16 flops per second, bytes per second, of one chip: docs.cloud.google.com/tpu/docs/v5e, v6e and v5p;
# nvidia.com/en-us/data-center/h100, an H100 SXM without sparsity.
CHIPS = {
    "v5e": ("v5e:2x2", 197e12, 819e9),
    "v6e": ("v6e:2x2", 918e12, 1638e9),
    "v5p": ("v5p:2x2x1", 459e12, 2765e9),
    "h100": (1, 989e12, 3352e9),
}
SMALL = (1024, 128, 5003)  # positions, features, classes
SIZES = {
    "tpu": [(8192, 2048, 151936)],
    "h100": [(8192, 4096, 128256), (32768, 4096, 128256), (16384, 2048, 248320)],  # as others have published
}
OPTIONS = {
    "jxent": {},
    "jxent, `recompute=True`": {"recompute": True},
    'jxent, `reduction="none"`, summed': {"reduction": "none"},
    "jxent, smoothing and z-loss": {"label_smoothing": 0.1, "z_loss_weight": 1e-4},
    "jxent, 256 positions": {"block_size": 256},
    "jxent, 2048 positions": {"block_size": 2048},
}
FEATURES = (1024, 50257), (2048, 151936), (4096, 128256), (8192, 128256)  # and classes, of 8192 positions
HEADS = ("", "temporaries", "of full logits", "accessed", "flops", "at least", "one by one")


def traffic(platform, smoke):
    if platform not in SIZES:
        raise SystemExit("traffic is read from programs of the compilers of TPU and H100: --platform tpu or h100")
    chips = [chip for chip in CHIPS if (chip == "h100") == (platform == "h100")][: 1 if smoke else None]
    for size in [SMALL] if smoke else SIZES[platform]:
        positions, features, vocab = size
        full = 2 * positions * vocab
        print(f"\n{positions} positions, {features} features, {vocab} classes, bfloat16")
        print(f"Full logits: {full / MIB:,.0f} MiB in bfloat16, {full / MIB * 2:,.0f} in float32")
        for chip in chips:
            of_chip(chip, size, full, most=2 if smoke else None)


def of_chip(chip, size, full, most):
    """The tables of one chip; `full` is the size of the logits, and `most` how many losses each table has."""
    hidden, kernel, labels = arguments(*size, jnp.bfloat16)
    logits = jax.ShapeDtypeStruct((size[0], size[2]), jnp.bfloat16)
    device = (h100s if chip == "h100" else tpus)(CHIPS[chip][0])[0]
    with on(device):
        of_hidden = linear_losses()
    of_hidden |= {name: linear(**ONE_LOOP, **options) for name, options in OPTIONS.items()}
    for title, losses, args, wrt in (
        ("value and gradients by hidden states and kernel", of_hidden, (hidden, kernel, labels), (0, 1)),
        ("value and gradient by hidden states; the kernel is frozen", of_hidden, (hidden, kernel, labels), (0,)),
        ("the loss alone", of_hidden, (hidden, kernel, labels), ()),
        ("value and gradient by logits, given", logits_losses(), (logits, labels), (0,)),
    ):
        print(f"\n{device.device_kind}: {title}")
        table(HEADS, ((name, *cells(losses[name], args, wrt, chip, device, full)) for name in list(losses)[:most]))


def recompute(platform, smoke):
    """Three matmuls or four: a loss whose gradients are computed forwards or backwards, on chips of a TPU."""
    if platform != "tpu":
        raise SystemExit("the compiler of TPUs alone estimates cycles: --platform tpu")
    chips = [chip for chip in CHIPS if chip != "h100"]
    rows = []
    for features, vocab in [SMALL[1:]] if smoke else FEATURES:
        positions = SMALL[0] if smoke else 8192
        for chip in chips[: 1 if smoke else None]:
            of_three, of_four = (_work(chip, (positions, features, vocab), flag) for flag in (False, True))
            moved, cycles = (
                [f"{each / 10**power:,.1f}" for each in pair]
                for pair, power in (((of_three.bytes, of_four.bytes), 9), ((of_three.cycles, of_four.cycles), 6))
            )
            ratio = f"{of_four.cycles / of_three.cycles:.2f}"
            rows.append((f"{positions} x {features} x {vocab}", chip, *moved, *cycles, ratio))
    heads = "GB, forwards", "GB, backwards", "M cycles, forwards", "M cycles, backwards", "ratio"
    table(("positions x features x classes", "chip", *heads), rows)


def _work(chip, size, flag):
    """What value and gradients of a mean do, with `recompute=flag`."""
    loss = linear(**ONE_LOOP, recompute=flag)
    made = compiled(jax.value_and_grad(loss, (0, 1)), arguments(*size, jnp.bfloat16), tpus(CHIPS[chip][0])[0])
    return Program(made.as_text()).work()


def cells(loss, args, wrt, chip, device, full):
    """Of one program."""
    _, peak, bandwidth = CHIPS[chip]
    options = {"compiler_options": CUBLAS} if chip == "h100" else {}
    try:
        made = compiled(jax.value_and_grad(loss, wrt) if wrt else loss, args, device, **options)
    except Exception as error:  # whatever a peer raises is its result
        return [reason(error).replace("|", "/")[:160], *[""] * (len(HEADS) - 2)]
    held, program = temporaries(made), Program(made.as_text())
    memory = [f"{held / MIB:,.1f} MiB", f"{held / full:.1%}"]
    if program.kernels():
        return [*memory, "in a kernel", "in a kernel", "", ""]
    work = program.work()
    at_least, one_by_one = max(work.flops / peak, work.bytes / bandwidth), program.seconds(peak, bandwidth)
    times = [f"{1e3 * seconds:.1f} ms" for seconds in (at_least, one_by_one)]
    return [*memory, f"{work.bytes / 1e9:,.1f} GB", f"{work.flops / 1e12:.2f} T", *times]
