"""How XLA compiles what the tests run.

Most programs run once, so that in the short run XLA optimizes little (conftest.py). Rounding and memory are judged in
programs as users have them: `optimized`.
"""

from functools import partial

import jax

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
OPTIMIZED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
if jax.__version_info__ < (0, 11):  # newer releases have no other emitters than the ones that users have
    QUICK["xla_cpu_use_fusion_emitters"] = False
    OPTIMIZED["xla_cpu_use_fusion_emitters"] = True

QUICK_FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in QUICK.items())
optimized = partial(jax.jit, compiler_options=OPTIMIZED)
