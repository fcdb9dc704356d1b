"""Memory, collectives and traffic of the losses, read from compiled programs. Nothing runs, and no device is needed.

    pip install -e ".[bench,test]"
    python benchmarks/compiled.py memory                           # docs/benchmarks/compiled.md
    python benchmarks/compiled.py post-training --platform h100    # docs/benchmarks/compiled.md, beside Liger's figures
    python benchmarks/compiled.py sharding --platform tpu          # docs/benchmarks/compiled.md
    python benchmarks/compiled.py steps --platform tpu             # training steps, h100 too
    python benchmarks/compiled.py traffic --platform tpu           # docs/benchmarks/accelerators.md, 30 min; h100 too
    python benchmarks/compiled.py recompute --platform tpu         # docs/benchmarks/accelerators.md
    python benchmarks/compiled.py memory --smoke                   # small sizes

The platform is this CPU unless it is named. platforms.py says what to install for the compilers of H100 and TPU. Prints
Markdown tables. Temporaries are allocated besides arguments and results, by `compiled.memory_analysis()`; a compiler
may use a result's memory for them while the result is not written yet.
"""

import argparse
import sys
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # for h100.py, hlo.py and train_step.py
from compiled_memory import memory, post_training
from compiled_sharding import sharding, steps
from compiled_traffic import recompute, traffic
from platforms import PLATFORMS

TABLES = {
    "memory": memory,
    "post-training": post_training,
    "sharding": sharding,
    "steps": steps,
    "traffic": traffic,
    "recompute": recompute,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", choices=TABLES)
    parser.add_argument("--platform", choices=PLATFORMS, default="cpu", help="to compile for")
    parser.add_argument("--smoke", action="store_true", help="small sizes, to see that it runs")
    args = parser.parse_args()
    print(f"JAX {jax.__version__}, compiled for {args.platform}")
    TABLES[args.tables](args.platform, args.smoke)


if __name__ == "__main__":
    main()
