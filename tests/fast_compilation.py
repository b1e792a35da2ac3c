"""Flags that make XLA compile quickly for the CPU: most of the suite's time is compilation.

LLVM does not optimise, XLA emits the loops of fusions itself (through MLIR, a decoding step takes
2.6 times as long to compile and a training step 4 times), and each program is one LLVM module.
"""

FAST_COMPILATION = " ".join(
    (
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=1",
    )
)
