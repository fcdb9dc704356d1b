"""What divergences.py and policy.py share: a few compiled programs of the same arrays, their memory and their times."""

import re
import statistics
import time

import jax
from report import mib
from tqdm import tqdm


def measured(programs, arrays, rounds):
    """A row for each program: its temporaries in bytes, its matmuls, the median of its seconds.

    Each round runs every program once, so that what else the machine does meets all of them.
    """
    seconds = {name: [] for name in programs}
    for _ in tqdm(range(rounds), desc="rounds", disable=None):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*arrays))
            seconds[name].append(time.perf_counter() - start)
    return [
        {
            "program": name,
            "temporaries": program.memory_analysis().temp_size_in_bytes,
            "matmuls": len(re.findall(r" dot\(", program.as_text())),
            "seconds": statistics.median(seconds[name]),
        }
        for name, program in programs.items()
    ]


def print_measured(rows):
    print("\n| value and gradients | temporaries | matmuls | seconds |\n|---|---:|---:|---:|")
    for row in rows:
        print(f"| {row['program']} | {mib(row['temporaries'])} | {row['matmuls']} | {row['seconds']:.2f} |")
