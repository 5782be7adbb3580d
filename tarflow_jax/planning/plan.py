"""Compiles a recipe's training step or sampler for a topology, and says what it needs of each device."""

import dataclasses
import math
import re
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tarflow_jax.errors import one_line
from tarflow_jax.planning.collectives import Collective, collectives
from tarflow_jax.planning.flops import forward_flops, program_flops
from tarflow_jax.planning.topology import Topology
from tarflow_jax.runtime import Program, batch_sharding, replicated
from tarflow_jax.sampling import Guidance, decode
from tarflow_jax.student import Student
from tarflow_jax.training import Recipe
from tarflow_jax.training.state import abstract_state
from tarflow_jax.training.step import compiled_step


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a compiled program needs. Bytes and collectives are those of one device in one step."""

    topology: str
    num_devices: int
    num_slices: int
    device_memory: int  # bytes
    device_flops: float  # peak FLOP/s; 0 if unknown
    mesh: dict[str, int]  # sizes by axis
    batch_size: int  # images per step on all devices together
    num_steps: int  # of the recipe; 0 for a sampler
    state_bytes: dict[str, int]  # by parameters, optimizer, EMA, batch
    flops: float  # of one device's matmuls, recomputation included
    model_flops: float  # of all devices' matmuls together, without recomputation
    problem: str = ""  # what XLA says of a program that it does not compile for lack of memory
    temporary_bytes: float = math.nan  # of all else in memory while the program runs, results included
    code_bytes: float = math.nan
    collectives: dict[str, Collective] = dataclasses.field(default_factory=dict)
    compile_seconds: float = math.nan  # CPU time, all cores together
    hlo: str = dataclasses.field(default="", repr=False)  # the compiled program's text

    @property
    def total_bytes(self) -> float:
        return sum(self.state_bytes.values()) + self.temporary_bytes + self.code_bytes

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.device_memory

    def step_seconds(self, mfu: float) -> float:
        """Returns the time of a step at a model-FLOPs utilization; NaN if the device's peak is unknown."""
        return self.model_flops / (self.num_devices * self.device_flops * mfu) if self.device_flops else math.nan

    def table(self, mfu: float) -> str:
        """Returns the figures as lines of text, with times at a model-FLOPs utilization."""
        mesh = " x ".join(f"{axis} {size}" for axis, size in self.mesh.items())
        rows = {"devices": f"{self.num_devices} as {mesh}", "images per step": f"{self.batch_size:,}"}
        sizes = self.state_bytes | {"temporaries": self.temporary_bytes, "program": self.code_bytes}
        rows |= {name: _size(size) for name, size in sizes.items() if not math.isnan(size)}
        used = self.problem or f"{_size(self.total_bytes)} of {_size(self.device_memory)}"
        rows["memory"] = f"{used}: {'fits' if self.fits else 'does not fit'}"
        rows["matmuls"] = f"{self.flops / 1e12:,.3f} TFLOP per step"
        for kind, collective in sorted(self.collectives.items()):
            rows[kind] = f"{collective.count:,} per step, {collective.bytes / 1e6:,.1f} MB sent"
        rows["compiled in"] = f"{self.compile_seconds:.0f} s of CPU time"
        if self.device_flops:
            seconds = self.step_seconds(mfu)
            rows[f"at {mfu:.0%} MFU"] = f"{seconds:.3g} s per step, {self.batch_size / seconds:,.0f} images/s"
            if self.num_steps:
                hours = seconds * self.num_steps / 3600
                rows["whole run"] = f"{hours:,.1f} hours, {hours * self.num_devices:,.0f} chip-hours"
        return "\n".join(f"{name:<20} {value}" for name, value in rows.items())


def make_plan(recipe: Recipe, topology: Topology, sampler: bool = False) -> Plan:
    """Compiles a recipe's training step, or its sampler for as many images as a training batch.

    Raises:
      UserError: the batch or a parameter does not divide by the recipe's mesh.
    """
    mesh, fields = recipe.mesh(topology.devices), recipe.config.train
    state, rows = abstract_state(recipe.train_config, mesh), batch_sharding(mesh)
    dtype = jnp.float32 if sampler else jnp.uint8
    images = jax.ShapeDtypeStruct((fields.batch_size, *recipe.model.image_shape), dtype, sharding=rows)
    labels = jax.ShapeDtypeStruct((fields.batch_size,), jnp.int32, sharding=rows)
    parts = {"parameters": state.variables, "batch": (images, labels)}
    if sampler:
        program, image_flops = _sampler(recipe, mesh)
        arguments = (state.variables, images, labels)
    else:
        parts |= {"optimizer": state.opt_state, "EMA": state.ema_params}
        key = jax.ShapeDtypeStruct((), jax.eval_shape(jax.random.key, 0).dtype, sharding=replicated(mesh))
        program, image_flops = compiled_step(recipe.train_config, mesh), 3 * forward_flops(recipe.model)
        arguments = (state, images, labels, key)

    begin = time.process_time()
    traced = program.trace(*arguments)
    plan = Plan(
        topology=topology.name,
        num_devices=mesh.size,
        num_slices=topology.num_slices,
        device_memory=topology.chip.memory,
        device_flops=topology.chip.flops,
        mesh=dict(mesh.shape),
        batch_size=fields.batch_size,
        num_steps=0 if sampler else fields.num_steps,
        state_bytes={name: _device_bytes(part) for name, part in parts.items()},
        flops=program_flops(traced.jaxpr) / mesh.size,
        model_flops=fields.batch_size * image_flops,
    )
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = re.search(r"Used \S+ of \S+ \w+", str(error))  # such as "Used 20.1G of 15.75G hbm"
        return dataclasses.replace(plan, problem=used[0] if used else one_line(error))
    text, memory = compiled.as_text(), compiled.memory_analysis()
    return dataclasses.replace(
        plan,
        temporary_bytes=memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        collectives=collectives(text, mesh.size, topology.num_slices),
        compile_seconds=time.process_time() - begin,
        hlo=text,
    )


def changes(recipe: Recipe, plan: Plan) -> Iterator[dict[str, Any]]:
    """Yields config fields to change in a recipe that does not fit: one change, then each time one more."""
    fields, model = recipe.config.train, recipe.config.model
    shards = plan.mesh["data"] * plan.mesh["fsdp"]
    fsdp = shards // plan.num_slices
    candidates: list[tuple[bool, dict[str, Any]]] = [
        (model.remat != "full", {"model.remat": "full"}),
        (
            fsdp > plan.mesh["fsdp"] and model.width % fsdp == 0,
            {"mesh.data": plan.num_slices, "mesh.fsdp": fsdp},
        ),
        *(
            (n > fields.accumulation and fields.batch_size % (n * shards) == 0, {"train.accumulation": n})
            for n in (2, 4, 8, 16, 32, 64)
        ),
        (model.dtype != "bfloat16", {"model.dtype": "bfloat16"}),
    ]
    change: dict[str, Any] = {}
    for possible, more in candidates:
        if possible:
            change = change | more
            yield change


def _sampler(recipe: Recipe, mesh: Mesh) -> tuple[Program, float]:
    """The recipe's student if it has one, else the sequential decoder; and the model FLOPs of an image."""
    model, student, guidance = recipe.model, recipe.student, Guidance(**recipe.config.sample.guidance)

    def sample(variables: Any, latents: jax.Array, labels: jax.Array) -> jax.Array:
        given = labels if model.num_classes else None
        numbers = jnp.ones(len(labels))  # noise levels, or guidance weights of a student
        with jax.default_matmul_precision("highest" if model.dtype == "float32" else "default"):
            if student:
                weights = numbers if student.max_guidance else None
                return Student(student).apply(variables, latents, given, weights)[0]
            levels = numbers if model.noise_conditional else None
            return decode(model, variables, latents, given, guidance if guidance.weight else None, levels).images

    program = Program(jax.jit(sample, out_shardings=batch_sharding(mesh)), mesh)
    if student:
        return program, forward_flops(student.shape)
    return program, (2 if guidance.weight else 1) * forward_flops(model)


def _device_bytes(tree: Any) -> int:
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _size(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
