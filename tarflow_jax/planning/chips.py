"""The chips that a program can be compiled for, and what their makers say of them."""

import dataclasses
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from tarflow_jax.errors import MissingPackageError, UserError, one_line
from tarflow_jax.planning import gpus

GIB = 2**30
# libtpu otherwise asks the network which TPU this is, and lets one process in at a time.
_NO_TPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """Data-sheet figures of one device, in bytes, bytes/s and FLOP/s. A rate of 0 is unknown, and sets no limit."""

    memory: int
    flops: float = 0.0  # dense bfloat16; float32 products run as bfloat16 ones on a TPU unless told otherwise
    memory_rate: float = 0.0
    link_rate: float = 0.0  # sent to chips of its slice, or GPUs of its host, all links together, one way
    network_rate: float = 0.0  # sent to other slices or hosts; 0 where there are none


# By device kind. TPU: cloud.google.com/tpu/docs (its interconnect figures are for both ways together, and a pod's
# network is divided by its chips); NVIDIA: data sheets of the GPUs and of the DGX systems, one network port a GPU.
CHIPS = {
    "TPU v4": Chip(32 * GIB, 275e12, 1228e9),
    "TPU v5 lite": Chip(16 * GIB, 197e12, 819e9, 200e9, 3.1e9),
    "TPU v5": Chip(95 * GIB, 459e12, 2765e9, 600e9, 6.2e9),
    "TPU v6 lite": Chip(32 * GIB, 918e12, 1640e9, 400e9, 12.5e9),
    "NVIDIA A100": Chip(80 * GIB, 312e12, 2039e9, 300e9, 25e9),
    "NVIDIA H100": Chip(80 * GIB, 989e12, 3350e9, 450e9, 50e9),
    "NVIDIA H200": Chip(141 * GIB, 989e12, 4800e9, 450e9, 50e9),
    "NVIDIA B200": Chip(180 * GIB, 2250e12, 8000e9, 900e9, 50e9),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for, by a name as "v5e:16x16" or "h100:8"; they need not exist here.

    A network joins slices of TPUs, and hosts of as many GPUs each.
    """

    name: str
    devices: Sequence[jax.Device]
    chip: Chip
    slices: int = 1
    hosts: int = 1  # of GPUs


def known_chip(kind: str) -> Chip | None:
    """The data sheet of a device kind, as "NVIDIA H100 80GB HBM3" or "TPU v5 lite"; None if it is not in the table."""
    names = [name for name in CHIPS if kind.startswith(name)]
    return CHIPS[max(names, key=len)] if names else None


def prepare(name: str) -> None:
    """For `open_topology` of the same name in a process that does nothing else, before JAX looks for devices."""
    platform, _, size = name.partition(":")
    if platform == "gpu":
        return
    jax.config.update("jax_platforms", "cpu")  # JAX's CUDA plugin then does without a driver
    # A program for devices that are not here can be kept, but not read again.
    jax.config.update("jax_enable_compilation_cache", False)
    if platform in gpus.GPUS:
        gpus.hide()
    forced = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if platform == "cpu" and size.isdigit() and not forced:
        jax.config.update("jax_num_cpu_devices", int(size))


def open_topology(name: str, num_slices: int = 1) -> Topology:
    """The devices of "v5e:16x16" and other TPU topologies, of "h100:8" or "h100:8x4" (4 hosts), of "cpu:8" or "gpu:1".

    The first two need the compiler, libtpu or JAX's CUDA plugin, but no such device; for GPUs, after `prepare`.
    Raises ValueError if there is no such topology, or fewer devices; ImportError if the compiler is not installed.
    """
    platform, _, size = name.partition(":")
    if platform not in ("cpu", "gpu", *gpus.GPUS):
        return _tpu(name, num_slices)
    if num_slices != 1:
        raise UserError(f"num_slices is {num_slices}; only TPU topologies have slices")
    if platform in gpus.GPUS:
        compiled_for, hosts = gpus.devices(name)
        return Topology(name, compiled_for, _chip_of(compiled_for[0]), hosts=hosts)
    count = int(size) if size.isdigit() else 0
    try:
        devices = jax.devices(platform)
    except RuntimeError:
        devices = []
    if not 1 <= count <= len(devices):
        raise UserError(f"topology is {name!r}, but there are {len(devices)} {platform} devices here")
    if platform == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // count
        return Topology(name, devices[:count], Chip(memory))
    return Topology(name, devices[:count], _chip_of(devices[0]))


def _tpu(name: str, num_slices: int) -> Topology:
    if importlib.util.find_spec("libtpu") is None:
        raise MissingPackageError(f"compiling for {name} needs libtpu: pip install -r requirements-plan.txt")
    for variable, value in _NO_TPU.items():
        os.environ.setdefault(variable, value)
    options = {"num_slices": num_slices} if num_slices != 1 else {}
    try:
        devices: list[Any] = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        raise UserError(
            f"no TPU topology {name!r} of {num_slices} slice(s) ({one_line(error)}); expected one as v5e:16x16"
        ) from error
    return Topology(name, devices, _chip_of(devices[0]), num_slices)


def _chip_of(device: Any) -> Chip:
    chip = known_chip(device.device_kind)
    if chip is None:
        raise UserError(f"{device.device_kind} is not one of the known chips: {', '.join(CHIPS)}")
    return chip
