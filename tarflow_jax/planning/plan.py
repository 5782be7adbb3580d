"""Compiles a recipe's training step or sampler for a topology, and reports what it needs per device."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tarflow_jax.data import Latents
from tarflow_jax.errors import UserError, one_line
from tarflow_jax.flow import Conditioning
from tarflow_jax.planning.flops import forward_flops, program_flops
from tarflow_jax.planning.topology import Topology
from tarflow_jax.runtime import batch_sharding, device_flow, replicated, use_mesh
from tarflow_jax.sampling import Guidance, decode
from tarflow_jax.training import Recipe
from tarflow_jax.training.step import abstract_state, jitted_step


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a compiled program needs; bytes and FLOPs are per device and step."""

    topology: str
    device_memory: int  # bytes
    device_flops: float  # peak FLOP/s; 0 if unknown
    mesh: dict[str, int]  # sizes by axis
    batch_size: int  # images per step on all devices together
    num_steps: int  # of the whole run; 0 for a sampler
    state_bytes: dict[str, int]  # by parameters, batch, optimizer, EMA
    flops: float  # of matmuls, with recomputation
    model_flops: float  # of a forward and a backward pass, without recomputation; 0 for a sampler
    problem: str = ""  # XLA's message if it ran out of device memory when compiling
    temporary_bytes: float = math.nan  # activations, gradients, results
    code_bytes: float = math.nan

    @property
    def total_bytes(self) -> float:
        return sum(self.state_bytes.values()) + self.temporary_bytes + self.code_bytes

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.device_memory

    def table(self, mfu: float) -> str:
        """Returns the figures as lines of text, with the training time at this model-FLOPs utilization."""
        mesh, num_devices = " x ".join(f"{axis} {n}" for axis, n in self.mesh.items()), math.prod(self.mesh.values())
        rows = {"devices": f"{num_devices} as {mesh}", "images per step": f"{self.batch_size:,}"}
        sizes = self.state_bytes | {"temporaries": self.temporary_bytes, "program": self.code_bytes}
        rows |= {name: f"{size / 2**20:,.1f} MiB" for name, size in sizes.items() if size and not math.isnan(size)}
        used = self.problem or f"{self.total_bytes / 2**20:,.1f} of {self.device_memory / 2**20:,.0f} MiB"
        rows["memory"] = f"{used}: {'fits' if self.fits else 'does not fit'}"
        rows["matmuls"] = f"{self.flops / 1e12:,.3f} TFLOP per step"
        if self.device_flops and self.num_steps:
            seconds = self.model_flops / (self.device_flops * mfu)
            hours = seconds * self.num_steps / 3600
            rows[f"at {mfu:.0%} MFU"] = f"{seconds:.3g} s per step, {self.batch_size / seconds:,.0f} images/s"
            rows["whole run"] = f"{hours:,.1f} hours, {hours * num_devices:,.0f} device-hours"
        return "\n".join(f"{name:<26} {value}" for name, value in rows.items())


def make_plan(recipe: Recipe, topology: Topology, sampler: bool = False) -> Plan:
    """Compiles a recipe's training step, or the sequential decoder with the recipe's guidance and batch size.

    Raises UserError if the recipe's mesh does not divide the batch or a parameter.
    """
    if recipe.model.is_sequence:
        raise UserError("a plan is for a flow of images; this one is of sequences")
    mesh, fields = recipe.mesh(topology.devices), recipe.config.train
    traced, arguments = trace(recipe, mesh, sampler)
    measured: dict[str, Any]
    try:
        memory = traced.lower().compile().memory_analysis()
        temporary = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        measured = {"temporary_bytes": temporary, "code_bytes": memory.generated_code_size_in_bytes}
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        measured = {"problem": one_line(error)}
    return Plan(
        topology=topology.name,
        device_memory=topology.chip.memory,
        device_flops=topology.chip.flops,
        mesh=dict(mesh.shape),
        batch_size=fields.batch_size,
        num_steps=0 if sampler else fields.num_steps,
        state_bytes={name: _device_bytes(argument) for name, argument in arguments.items()},
        flops=program_flops(traced.jaxpr) / mesh.size,
        model_flops=0 if sampler else 3 * forward_flops(recipe.model) * fields.batch_size / mesh.size,
        **measured,
    )


def trace(recipe: Recipe, mesh: Mesh, sampler: bool) -> tuple[Any, dict[str, Any]]:
    """Traces the program that `make_plan` compiles on abstract arrays; returns the trace and the arguments by name."""
    state, rows = abstract_state(recipe.train_config, mesh), batch_sharding(mesh)
    model, count = recipe.model, recipe.config.train.batch_size

    def abstract(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct((count, *shape), dtype, sharding=rows)

    latents, labels = abstract(jnp.float32, *model.image_shape), abstract(jnp.int32)
    condition = abstract(jnp.float32, *model.condition_shape) if model.has_prefix else None
    if sampler:
        levels = abstract(jnp.float32) if model.noise_conditional else None
        conditioning = Conditioning(labels if model.num_classes else None, levels, condition)
        guidance = Guidance(**recipe.config.sample.guidance).checked_for(model)
        with use_mesh(mesh), jax.default_matmul_precision("highest"):
            traced = decode.trace(device_flow(model), state.variables, latents, conditioning, guidance=guidance)
        return traced, {"parameters": state.variables, "batch": (latents, labels)}
    pixels = abstract(f"uint{model.image_bits}", *model.image_shape) if model.image_bits else None
    images = Latents(latents, latents, condition) if pixels is None else pixels
    key = jax.ShapeDtypeStruct((), jax.eval_shape(jax.random.key, 0).dtype, sharding=replicated(mesh))
    with use_mesh(mesh):
        traced = jitted_step(recipe.train_config, mesh).trace(state, images, labels, key)
    arguments = {"parameters": state.variables, "batch": (images, labels)}
    return traced, arguments | {"optimizer": state.opt_state, "EMA": state.ema_params}


def _device_bytes(tree: Any) -> int:
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
