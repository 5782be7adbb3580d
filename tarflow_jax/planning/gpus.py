"""NVIDIA GPUs that need not be there: what XLA has to know of one to compile for it."""

import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from tarflow_jax.errors import MissingPackageError, UserError, one_line


class Gpu(NamedTuple):
    """What kernels are chosen and tiled by; cudaGetDeviceProperties tells it where there is one."""

    kind: str  # as `jax.Device.device_kind` has it
    capability: int  # compute capability, its major version
    cores: int  # streaming multiprocessors
    lanes: int  # float32 units of one
    shared_memory: int  # bytes of one
    block_memory: int  # of it, for one block of threads that opts in
    cache: int  # level 2, bytes
    clock_ghz: float
    bandwidth: int  # of memory, bytes/s
    memory: int  # bytes


GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", 8, 108, 64, 167936, 166912, 40 << 20, 1.41, 2039 * 10**9, 85100068864),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 9, 132, 128, 233472, 232448, 50 << 20, 1.98, 3352 * 10**9, 84942979072),
    "h200": Gpu("NVIDIA H200", 9, 132, 128, 233472, 232448, 50 << 20, 1.98, 4800 * 10**9, 151397597184),
    "b200": Gpu("NVIDIA B200", 10, 148, 128, 233472, 232448, 132644864, 1.965, 7672 * 10**9, 191514411008),
}
_CUDNN, _CUDA = (9, 8), (12, 9)  # versions that requirements-plan-gpu.txt brings, or later
_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
_NO_TRIALS = "--xla_gpu_autotune_level=0"  # of kernels against each other, which takes a GPU


def parse(name: str) -> tuple[Gpu, int, int]:
    """(kind, GPUs of a host, hosts) of "h100:8" or "h100:8x4"; UserError for another name."""
    found = re.fullmatch(r"(\w+):([1-9]\d*)(?:x([1-9]\d*))?", name)
    if found is None or found[1] not in GPUS:
        raise UserError(
            f"no GPU topology {name!r}; expected one as h100:8, or of several hosts h100:8x4, of {', '.join(GPUS)}"
        )
    return GPUS[found[1]], int(found[2]), int(found[3] or 1)


def hide() -> None:
    """Before JAX looks for devices: this process compiles for GPUs as if none were there, and tries no kernel."""
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_NO_TRIALS}".strip()


def devices(name: str) -> tuple[Sequence[Any], int]:
    """The devices of a topology, and its hosts. MissingPackageError where JAX's CUDA plugin is not installed."""
    gpu, count, hosts = parse(name)
    if not any(map(importlib.util.find_spec, _PLUGINS)):
        raise MissingPackageError(f"compiling for {name} needs JAX for CUDA: pip install -r requirements-plan-gpu.txt")
    try:
        found = topologies.get_topology_desc(
            platform="cuda", target_config=target_config(gpu), topology=f"1x{hosts}x{count}"
        )
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        raise UserError(f"XLA knows no GPU topology {name!r} ({one_line(error)})") from error
    return found.devices, hosts


def target_config(gpu: Gpu) -> str:
    """XLA's GpuTargetConfigProto as text."""
    device = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 48 << 10,
        "shared_memory_per_core": gpu.shared_memory,
        "shared_memory_per_block_optin": gpu.block_memory,
        "threads_per_core_limit": 2048,
        "core_count": gpu.cores,
        "fpus_per_core": gpu.lanes,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "memory_bandwidth": gpu.bandwidth,
        "l2_cache_size": gpu.cache,
        "clock_rate_ghz": gpu.clock_ghz,
        "device_memory_size": gpu.memory,
    }
    fields = " ".join(f"{name}: {value}" for name, value in device.items())
    return (
        f"gpu_device_info {{ {fields} cuda_compute_capability {{ major: {gpu.capability} }} }} "
        f'platform_name: "CUDA" '
        f"dnn_version_info {{ major: {_CUDNN[0]} minor: {_CUDNN[1]} }} "
        f"runtime_version {{ major: {_CUDA[0]} minor: {_CUDA[1]} }} "
        f'device_description_str: "{gpu.kind}"'
    )
