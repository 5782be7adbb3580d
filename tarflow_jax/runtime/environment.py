"""Release, commit, versions and machine, stored with measurements so that they can be compared and repeated."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

from tarflow_jax.runtime.cores import usable_cores
from tarflow_jax.version import __version__

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def environment() -> dict[str, Any]:
    """Returns versions, the commit (None outside a clone), machine and devices, as strings and numbers by name."""
    devices = jax.devices()
    return {
        "tarflow_jax": __version__,
        "commit": commit_of(Path(__file__).parents[2]),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
        "system": platform.platform(),
        "processor": _processor(),
        "cores": usable_cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "processes": jax.process_count(),
    }


def commit_of(clone: Path) -> str | None:
    """Returns a clone's commit, with the suffix -dirty if files differ from it; None without a clone or git."""
    if not (clone / ".git").exists():  # git would search the folders above, perhaps another repository
        return None
    command = ["git", "-C", str(clone), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
