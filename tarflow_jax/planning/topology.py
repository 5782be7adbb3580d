"""Devices to compile for, present or not: TPU topologies, NVIDIA GPUs on any number of hosts, this machine's CPU."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from tarflow_jax.errors import UserError, one_line


class Chip(NamedTuple):
    """Data-sheet figures of one device."""

    memory: int  # bytes
    flops: float  # dense bfloat16 FLOP/s, which TPUs reach with float32 too by default; 0 if unknown


# By prefix of `jax.Device.device_kind`, longer ones first. From cloud.google.com/tpu/docs and NVIDIA's data sheets.
CHIPS = {
    "TPU v4": Chip(32 << 30, 275e12),
    "TPU v5 lite": Chip(16 << 30, 197e12),
    "TPU v5": Chip(95 << 30, 459e12),
    "TPU v6 lite": Chip(32 << 30, 918e12),
    "NVIDIA A100": Chip(80 << 30, 312e12),
    "NVIDIA H100": Chip(80 << 30, 989e12),
    "NVIDIA H200": Chip(141 << 30, 989e12),
    "NVIDIA B200": Chip(180 << 30, 2250e12),
}

# Properties by which XLA chooses and tiles GPU kernels, from cudaGetDeviceProperties: compute capability, cores,
# float32 units and shared memory per core, shared memory per thread block, L2 cache, GHz, bytes/s, bytes of memory.
GPUS = {
    "a100": (8, 108, 64, 167936, 166912, 40 << 20, 1.41, 2039 * 10**9, 85100068864),
    "h100": (9, 132, 128, 233472, 232448, 50 << 20, 1.98, 3352 * 10**9, 84942979072),
    "h200": (9, 132, 128, 233472, 232448, 50 << 20, 1.98, 4800 * 10**9, 151397597184),
    "b200": (10, 148, 128, 233472, 232448, 132644864, 1.965, 7672 * 10**9, 191514411008),
}
# XLA's GpuTargetConfigProto; the oldest cuDNN and CUDA that requirements-plan-gpu.txt installs.
_GPU_CONFIG = """
    platform_name: "CUDA" device_description_str: "NVIDIA {name}"
    dnn_version_info {{ major: 9 minor: 8 }} runtime_version {{ major: 12 minor: 9 }}
    gpu_device_info {{ cuda_compute_capability {{ major: {0} }} core_count: {1} fpus_per_core: {2}
        shared_memory_per_core: {3} shared_memory_per_block_optin: {4} shared_memory_per_block: 49152
        l2_cache_size: {5} clock_rate_ghz: {6} memory_bandwidth: {7} device_memory_size: {8}
        threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
        thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
        block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        registers_per_block_limit: 65536 registers_per_core_limit: 65536 }}"""

# Without these, libtpu asks the network which TPU this is, and admits one process at a time.
_WITHOUT_TPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


class Topology(NamedTuple):
    """Devices to compile for."""

    name: str
    devices: Sequence[Any]
    chip: Chip


def known_chip(kind: str) -> Chip | None:
    """Returns the data sheet of a device kind such as "NVIDIA H100 80GB HBM3"; None if it is not in the table."""
    return next((chip for name, chip in CHIPS.items() if kind.startswith(name)), None)


def prepare(name: str) -> None:
    """Configures a process that only compiles for `open_topology(name)`; call it before JAX looks for devices."""
    platform, _, size = name.partition(":")
    jax.config.update("jax_platforms", "cpu")  # the CUDA plugin then needs no driver
    jax.config.update("jax_enable_compilation_cache", False)  # programs for absent devices cannot be read back
    flags = os.environ.get("XLA_FLAGS", "")
    if platform in GPUS:
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_autotune_level=0".strip()  # autotuning needs a GPU
    elif platform == "cpu" and size.isdigit() and "xla_force_host_platform_device_count" not in flags:
        jax.config.update("jax_num_cpu_devices", int(size))


def open_topology(name: str, num_slices: int = 1) -> Topology:
    """Returns the devices of "v5e:16x16", "h100:8", "h100:8x4" (4 hosts of 8 GPUs) or "cpu:8".

    TPUs, in one slice or several, and GPUs need their compiler (libtpu, JAX's CUDA plugin) but no device.
    Raises UserError if there is no such topology or its compiler is not installed.
    """
    platform, _, size = name.partition(":")
    if num_slices != 1 and platform in ("cpu", *GPUS):
        raise UserError(f"num_slices is {num_slices}; only TPU topologies have slices")
    if platform == "cpu":
        here, count = jax.devices("cpu"), int(size) if size.isdigit() else 0
        if not 1 <= count <= len(here):
            raise UserError(f"topology is {name!r}, but there are {len(here)} cpu devices here")
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // count
        return Topology(name, here[:count], Chip(memory, 0.0))
    if platform in GPUS:
        per_host, separator, hosts = size.partition("x")
        config = _GPU_CONFIG.format(*GPUS[platform], name=platform.upper())
        topology = f"1x{hosts if separator else 1}x{per_host}"
        options: dict[str, Any] = {"platform": "cuda", "target_config": config, "topology": topology}
    else:
        options = {"platform": "tpu", "topology_name": name, "num_slices": num_slices}
        os.environ |= _WITHOUT_TPU | dict(os.environ)  # a value that is set already stays
    try:
        devices: Any = topologies.get_topology_desc(**options).devices
    except (RuntimeError, ValueError) as error:
        expected = "one such as v5e:16x16, h100:8 or h100:8x4, and requirements-plan.txt or requirements-plan-gpu.txt"
        raise UserError(f"no topology {name!r} ({one_line(error)}); expected {expected} installed") from error
    chip = known_chip(devices[0].device_kind)
    if chip is None:
        raise UserError(f"{devices[0].device_kind} is not a known chip; expected one of {', '.join(CHIPS)}")
    return Topology(name, devices, chip)
