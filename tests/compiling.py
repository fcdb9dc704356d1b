"""How XLA compiles what the tests run.

Most programs run once, so that XLA optimizes little (conftest.py), in half the time. What the tests of rounding and of
memory compile with `optimized` is compiled as users have it. With `--exhaustive` so is all else but PyTorch's fixtures.
"""

from functools import partial

import jax

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
QUICK["xla_cpu_parallel_codegen_split_count"] = 1  # small programs: to compile them in parts takes a third longer
OPTIMIZED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
if jax.__version_info__ < (0, 11):  # JAX 0.12 knows no such flag
    QUICK["xla_cpu_use_fusion_emitters"] = False
    OPTIMIZED["xla_cpu_use_fusion_emitters"] = True

QUICK_FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in QUICK.items())
optimized = partial(jax.jit, compiler_options=OPTIMIZED)
