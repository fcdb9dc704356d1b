"""What PyTorch's losses hold on a CPU, besides the inputs and the gradients, for timing.py.

`peaks` runs this file as a process of its own: the growth of its resident memory during the second run, less the
gradients. Small arrays that fit in pages already resident do not show, so less than a MiB means little. Linux only.
"""

import json
import os
import pathlib
import subprocess
import sys

import peers
from cases import of_size


def peaks(case, grad, names):
    """Name -> bytes of temporaries; nothing for those that could not be measured."""
    if not names or not sys.platform.startswith("linux"):
        return {}
    # glibc is told to give every array of some size back when it is freed; else the next run uses the same pages again.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, json.dumps([case.size, case.dtype, grad, names])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    return dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))


def measure(case, grad, names):
    torch = peers.torch_here()
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    tensors = []
    for array in case.shapes()[:-1]:
        shape = array.shape if not tensors else array.shape[::-1]  # PyTorch's weight is (classes, features)
        tensors.append((torch.randn(shape, dtype=dtype) / shape[-1] ** 0.5).requires_grad_())
    tensors.append(torch.randint(0, case.size[-1], (case.size[0],)))
    losses = case.torch_losses()
    for name in names:
        run = peers.torch_call(losses[name], grad)
        out = run(tensors)
        outputs = sum(t.nbytes for t in out[1]) if grad else 0
        del out
        before = resident("VmRSS")
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        out = run(tensors)
        peak = resident("VmHWM")
        del out
        print(json.dumps([name, max(0, peak - before - outputs)]), flush=True)


def resident(field):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    size, dtype, grad, names = json.loads(sys.argv[1])
    measure(of_size(size, dtype), grad, names)
