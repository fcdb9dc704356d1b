"""PyTorch's losses of hidden states, each library in a process of its own, for gpu.py.

`measured` runs this file once for each library. It draws inputs like those of cases.py on PyTorch's device, compares
loss and gradients with float32 (block by block, on that device), and times each loss by itself. A library that is not
installed, fails, or takes too long is named, and what it had found by then counts.
"""

import functools
import importlib
import json
import os
import subprocess
import sys

import peers
from cases import CONFIDENT, Truth, of_size, rows_of
from report import reason, steps
from timing import check, entry, rounds, torch_program

PASSES = {"forward": False, "value_and_grad": True}


# Name -> module and function: the mean loss of the tensors (hidden, weight, labels). PyTorch's own are in peers.py.
LIBRARIES = {
    "PyTorch": None,
    "CCE": ("cut_cross_entropy", "linear_cross_entropy"),
    "Liger": ("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy"),
    "QuACK": ("quack.linear_cross_entropy", "chunked_linear_cross_entropy"),
}


def measured(sizes, dtype, number, seconds, smoke):
    """Lines {size, pass, entry} of programs, and {size, pass, name, left_out} of those that could not be timed."""
    lines = []
    for library in steps(LIBRARIES, "PyTorch's libraries"):
        command = [sys.executable, __file__, json.dumps([library, sizes, dtype, number, smoke])]
        env = os.environ | {"JAX_PLATFORMS": "cpu"}  # JAX takes no memory of the GPU there
        try:
            done = subprocess.run(command, capture_output=True, check=False, timeout=seconds, env=env)
            out, why = done.stdout, done.stderr.decode().strip().rpartition("\n")[2]
        except subprocess.TimeoutExpired as late:
            out, why = late.stdout or b"", f"not done after {seconds:.0f} s"
        found = [json.loads(line) for line in out.decode().splitlines() if line.startswith("{") and line.endswith("}")]
        seen = [(line["size"], line["pass"]) for line in found]
        wanted = [{"size": list(size), "pass": name, "name": library} for size in sizes for name in PASSES]
        lines += found + [w | {"left_out": why} for w in wanted if (w["size"], w["pass"]) not in seen]
    return lines


def inputs(torch, size, dtype, device, seed):
    """As those of `cases.of_hidden`, with the kernel as PyTorch lays it out."""
    positions, features, classes = size
    draw = functools.partial(torch.randn, generator=torch.Generator(device).manual_seed(seed), device=device)
    weight = (draw(classes, features) / features**0.5).to(getattr(torch, dtype))
    hidden = draw(positions, features).to(weight.dtype)
    labels = torch.randint(0, classes, (positions,), device=device)
    sure = min(CONFIDENT, positions // 8)
    hidden[:sure] = 20 * weight[labels[:sure]]
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def truth(torch, hidden, weight, labels):
    """In float32."""
    wide, loss, of_hidden, of_weight = weight.detach().float().requires_grad_(), 0.0, [], 0
    for part, chosen in zip(hidden.detach().split(1024), labels.split(1024), strict=True):
        part = part.float().requires_grad_()
        mean = torch.nn.functional.cross_entropy(part @ wide.T, chosen, reduction="sum") / len(labels)
        gradients = torch.autograd.grad(mean, (part, wide))
        loss, of_weight = loss + mean.double().item(), of_weight + gradients[1]
        of_hidden.append(gradients[0])
    gradients = torch.cat(of_hidden), of_weight.T
    return Truth(loss, {i: g[rows_of(g)].double().cpu().numpy() for i, g in enumerate(gradients)})


def measure(library, sizes, dtype, number, smoke):
    """Prints a line for each size, pass and loss; in a smoke test of none that PyTorch would compile."""
    torch = peers.torch_here()
    if torch is None:
        raise SystemExit(f"PyTorch: {peers.absent.get('torch')}")
    device, losses = "cuda" if torch.cuda.is_available() else "cpu", peers.torch_linear_losses(positions=0)
    if place := LIBRARIES[library]:
        losses = {library: getattr(importlib.import_module(place[0]), place[1])}
    losses = {name: loss for name, loss in losses.items() if not (smoke and name.endswith("compiled"))}
    for size in sizes:
        case = of_size(size, dtype)
        sets = [inputs(torch, size, dtype, device, seed) for seed in (0, 1)]
        truths = [truth(torch, *tensors) for tensors in sets]
        for name, loss in losses.items():
            for label, grad in PASSES.items():
                line = {"size": list(size), "pass": label}
                try:
                    program = torch_program(grad, name, loss, sets)
                    check(case, program, truths)
                    times, failed = rounds([program], number, f"{name}, {label}")
                    line |= {"name": name, "left_out": failed[name]} if failed else {"entry": entry(program, times)}
                except Exception as error:  # kernels raise what they like
                    line |= {"name": name, "left_out": reason(error)}
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    measure(*json.loads(sys.argv[1]))
