"""What a compiled program needs of each device, and how fast it can be at most."""

import dataclasses
import functools
import math
from typing import Any

from tarflow_jax.planning.chips import GIB, Topology
from tarflow_jax.planning.traffic import Traffic


@dataclasses.dataclass(frozen=True)
class Plan:
    """A program on a topology. Bytes, FLOPs and traffic are one device's; NaN where it did not compile."""

    topology: Topology
    mesh: dict[str, int]  # its axes and their sizes
    batch_size: int  # images of a step, on all devices together
    num_steps: int  # of the whole recipe; 0 for a sampler
    problem: str  # why XLA gave up: too little memory; "" if it did not
    state_bytes: dict[str, int]  # of parameters, optimizer, average and batch
    temporary_bytes: float  # what the program takes besides them while it runs, and its results
    code_bytes: float  # the program itself
    flops: float  # products of one step, with what is computed again
    model_flops: float  # the same on all devices together, nothing computed twice
    traffic: Traffic  # of one step
    compile_seconds: float  # of processor time, all cores together; tracing and lowering included

    @property
    def num_devices(self) -> int:
        return len(self.topology.devices)

    @property
    def total_bytes(self) -> float:
        return sum(self.state_bytes.values()) + self.temporary_bytes + self.code_bytes

    @property
    def fits(self) -> bool:
        return not self.problem and self.total_bytes <= self.topology.chip.memory

    @functools.cached_property
    def limits(self) -> dict[str, float]:
        """Seconds a step that each resource takes at its data-sheet rate; empty where the chip's rates are unknown."""
        chip, collectives = self.topology.chip, self.traffic.collectives.values()
        if self.problem:
            return {}
        amounts = {
            "products": (self.flops, chip.flops),
            "memory": (self.traffic.memory_bytes, chip.memory_rate),
            "links": (sum(collective.bytes for collective in collectives), chip.link_rate),
            "network": (sum(collective.network_bytes for collective in collectives), chip.network_rate),
        }
        return {name: amount / rate for name, (amount, rate) in amounts.items() if rate and amount}

    @property
    def bound(self) -> float:
        """Seconds that a step takes at least; NaN where the chip's rates are unknown or it did not compile."""
        return max(self.limits.values(), default=math.nan)

    def step_seconds(self, mfu: float) -> float:
        """At a model-FLOPs utilisation, or at the roofline where that is slower."""
        peak = self.topology.chip.flops * self.num_devices
        return max(self.model_flops / peak / mfu, *self.limits.values())

    def figures(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)} | {
            "topology": self.topology.name,
            "slices": self.topology.slices,
            "hosts": self.topology.hosts,
            "devices": self.num_devices,
            "device_memory": self.topology.chip.memory,
            "traffic": dataclasses.asdict(self.traffic),
            "total_bytes": self.total_bytes,
            "fits": self.fits,
            "limits": self.limits,
        }

    def table(self, mfu: float) -> str:
        """For people: a line a figure. `mfu` is the model-FLOPs utilisation that times are told for."""
        mesh = " x ".join(f"{axis} {size}" for axis, size in self.mesh.items())
        rows = {"devices": f"{self.num_devices} as {mesh}", "images a step": f"{self.batch_size}"}
        rows |= {name: _size(size) for name, size in self.state_bytes.items()}
        if self.problem:
            rows["does not fit"] = self.problem
            return _lines(rows)
        rows |= {
            "temporaries": _size(self.temporary_bytes),
            "program": _size(self.code_bytes),
            "together": f"{_size(self.total_bytes)} of {_size(self.topology.chip.memory)}"
            + ("" if self.fits else ": does not fit"),
            "products": f"{self.flops / 1e12:,.3f} TFLOP a step",
            "bytes moved": f"{self.traffic.memory_bytes / 1e9:,.2f} GB a step",
        }
        for kind, collective in sorted(self.traffic.collectives.items()):
            others = "slices" if self.topology.slices > 1 else "hosts" if self.topology.hosts > 1 else ""
            network = f", {collective.network_bytes / 1e6:,.1f} to other {others}" if others else ""
            rows[kind] = f"{collective.count:,} a step, {collective.bytes / 1e6:,.1f} MB sent{network}"
        rows["compiled in"] = f"{self.compile_seconds:.0f} s of processor time"
        return _lines(rows | self._times(mfu))

    def _times(self, mfu: float) -> dict[str, str]:
        if not self.limits:
            return {"times": "not told: this device's peak rates are not in tarflow_jax/planning/chips.py"}
        bound, slowest = max((seconds, name) for name, seconds in self.limits.items())
        shares = ", ".join(f"{name} {seconds * 1e3:.3g}" for name, seconds in self.limits.items())
        seconds = self.step_seconds(mfu)
        hours = seconds * self.num_steps / 3600
        held = "" if seconds > bound else f", held at the bound by {slowest}"
        rows = {
            "ms a step at least": f"{bound * 1e3:.4g}, by {slowest} ({shares})",
            "images/s at most": f"{self.batch_size / bound:,.0f}",
            f"at {mfu:.0%} MFU": f"{self.batch_size / seconds:,.0f} images/s{held}",
        }
        if self.num_steps:
            chip_hours = f"{hours * self.num_devices:,.0f} chip-hours"
            rows["the whole recipe"] = f"{self.num_steps:,} steps, {hours:,.1f} hours, {chip_hours}"
        return rows


def _size(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / 2**20:,.1f} MiB"


def _lines(rows: dict[str, str]) -> str:
    return "\n".join(f"{name:<20} {value}" for name, value in rows.items())
