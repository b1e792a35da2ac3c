"""What XLA's GPU compiler asks about a chip, from data sheets: no GPU was at hand.

In: a chip's name. Out: its figures, and its description for the compiler (`target_config`).

Sources: NVIDIA's data sheets of T4, L4, A100, H100 (SXM) and H200 (SXM), dense rates; the CUDA C++
programming guide, table of technical specifications per compute capability; memory as the driver
reports it, in GiB. Some sheets give rates with sparsity, which are twice the dense ones.
"""

from dataclasses import dataclass, replace

_KIB, _MIB, _GIB = 1 << 10, 1 << 20, 1 << 30
_CUDNN = (9, 10, 0)


@dataclass(frozen=True)
class GpuChip:
    """The data sheet of a chip."""

    name: str
    """As the driver names it."""
    capability: tuple[int, int]
    """Compute capability."""
    cores: int
    """Streaming multiprocessors."""
    l2_cache: int
    """Bytes."""
    clock: float
    """Boost clock in GHz."""
    memory: int
    """Bytes that the driver reports."""
    bandwidth: float
    """Bytes of memory per second."""
    peak_flops: float
    """FLOP/s of dense matrix products of 16-bit floats; of float16 where there is no bfloat16."""
    float32_flops: float
    """FLOP/s of float32 matrix products as JAX computes them: in TF32 where there is TF32."""

    @property
    def has_bfloat16(self) -> bool:
        """Whether it computes in bfloat16."""
        return self.capability >= (8, 0)


@dataclass(frozen=True)
class _Limits:
    """What a compute capability allows."""

    fpus_per_core: int
    threads_per_core: int
    shared_per_core: int  # bytes
    shared_per_block: int  # bytes, on request


_LIMITS = {
    (7, 5): _Limits(64, 1024, 64 * _KIB, 64 * _KIB),
    (8, 0): _Limits(64, 2048, 164 * _KIB, 163 * _KIB),
    (8, 9): _Limits(128, 1536, 100 * _KIB, 99 * _KIB),
    (9, 0): _Limits(128, 2048, 228 * _KIB, 227 * _KIB),
}


_A100_40GB = GpuChip(
    "NVIDIA A100-SXM4-40GB",
    (8, 0),
    cores=108,
    l2_cache=40 * _MIB,
    clock=1.41,
    memory=int(39.4 * _GIB),
    bandwidth=1555e9,
    peak_flops=312e12,
    float32_flops=156e12,
)
_H100 = GpuChip(
    "NVIDIA H100 80GB HBM3",
    (9, 0),
    cores=132,
    l2_cache=50 * _MIB,
    clock=1.98,
    memory=int(79.1 * _GIB),
    bandwidth=3350e9,
    peak_flops=989e12,
    float32_flops=494e12,
)
GPU_CHIPS = {
    "t4": GpuChip(
        "Tesla T4",
        (7, 5),
        cores=40,
        l2_cache=4 * _MIB,
        clock=1.59,
        memory=int(14.7 * _GIB),
        bandwidth=300e9,
        peak_flops=65e12,
        float32_flops=8.1e12,
    ),
    "l4": GpuChip(
        "NVIDIA L4",
        (8, 9),
        cores=58,
        l2_cache=48 * _MIB,
        clock=2.04,
        memory=int(22.0 * _GIB),
        bandwidth=300e9,
        peak_flops=121e12,
        float32_flops=60e12,
    ),
    "a100-40gb": _A100_40GB,
    "a100-80gb": replace(
        _A100_40GB,
        name="NVIDIA A100-SXM4-80GB",
        memory=int(79.2 * _GIB),
        bandwidth=2039e9,
    ),
    "h100": _H100,
    "h200": replace(_H100, name="NVIDIA H200", memory=int(139.8 * _GIB), bandwidth=4800e9),
}
"""By the names they rent under; the A100s, the H100 and the H200 are those on SXM boards."""


def target_config(chip: GpuChip) -> str:
    """Describe a chip to XLA: a `GpuTargetConfigProto` in text form.

    Args:
        chip: its data sheet.

    Returns:
        The text.
    """
    limits = _LIMITS[chip.capability]
    major, minor = chip.capability
    # Hopper's own instructions (sm_90a), as a driver reports them.
    extension = " feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    cudnn = "major: {} minor: {} patch: {}".format(*_CUDNN)
    return f"""\
platform_name: "CUDA"
device_description_str: "{chip.name}"
dnn_version_info {{ {cudnn} }}
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor}{extension} }}
  core_count: {chip.cores}
  fpus_per_core: {limits.fpus_per_core}
  clock_rate_ghz: {chip.clock}
  device_memory_size: {chip.memory}
  memory_bandwidth: {chip.bandwidth:.0f}
  l2_cache_size: {chip.l2_cache}
  shared_memory_per_core: {limits.shared_per_core}
  shared_memory_per_block: {48 * _KIB}
  shared_memory_per_block_optin: {limits.shared_per_block}
  registers_per_core_limit: {64 * _KIB}
  registers_per_block_limit: {64 * _KIB}
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: {limits.threads_per_core}
  block_dim_limit_x: {(1 << 31) - 1}
  block_dim_limit_y: {(1 << 16) - 1}
  block_dim_limit_z: {(1 << 16) - 1}
}}
"""


def cudnn_version() -> int:
    """The version of cuDNN that descriptions name, in cuDNN's own notation: 9.10.0 is 91000."""
    major, minor, patch = _CUDNN
    return 10_000 * major + 100 * minor + patch
