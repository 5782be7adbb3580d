"""The programs of a recipe, compiled for devices that need not exist: its training step and its samplers."""

import dataclasses
import functools
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tarflow_jax import programs
from tarflow_jax.arguments import check_guidance
from tarflow_jax.planning.chips import Topology
from tarflow_jax.planning.flops import forward_flops, program_flops
from tarflow_jax.planning.plan import Plan
from tarflow_jax.planning.traffic import Traffic, traffic
from tarflow_jax.runtime import Program, batch_sharding, replicated
from tarflow_jax.sampling import Guidance
from tarflow_jax.training import Recipe
from tarflow_jax.training.state import abstract_state
from tarflow_jax.training.step import compiled_step


@dataclasses.dataclass(frozen=True)
class Planned:
    """A program and the shapes, dtypes and shardings of its arguments, by what they are."""

    program: Program
    arguments: tuple[Any, ...]
    parts: dict[str, Any]
    model_flops: float  # of the whole batch, nothing computed twice
    num_steps: int  # of the whole recipe; 0 for a sampler, which has no end


def train_program(recipe: Recipe, mesh: Mesh) -> Planned:
    """The step that `training.train` runs; ValueError if the batch or a parameter does not divide by the mesh."""
    fields, batch = recipe.config.train, _images(recipe, mesh, jnp.uint8)
    state = abstract_state(recipe.train_config, mesh)
    key = jax.ShapeDtypeStruct((), jax.eval_shape(jax.random.key, 0).dtype, sharding=replicated(mesh))
    parts = {"parameters": state.variables, "optimizer": (state.step, state.opt_state), "average": state.ema_params}
    flops = 3 * fields.batch_size * forward_flops(recipe.model)
    step = compiled_step(recipe.train_config, mesh)
    return Planned(step, (state, *batch, key), {**parts, "batch": batch}, flops, fields.num_steps)


def sample_program(recipe: Recipe, mesh: Mesh) -> Planned:
    """The sequential decoder with the recipe's guidance, for as many images as a training batch; as `train_program`."""
    config = recipe.model
    state = abstract_state(recipe.train_config, mesh)
    latents, labels = _images(recipe, mesh, jnp.float32)
    guidance = check_guidance(config, Guidance(**recipe.config.sample.guidance))
    number = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
    level = jax.ShapeDtypeStruct(latents.shape[:1], jnp.float32, sharding=batch_sharding(mesh))
    levels = level if config.noise_conditional else None

    def sample(variables: Any, latents: jax.Array, labels: jax.Array, levels: Any, guidance: Any) -> jax.Array:
        given = labels if config.num_classes else None
        return programs.decode(config, variables, latents, given, levels, guidance).images

    program = Program(jax.jit(sample, out_shardings=batch_sharding(mesh)), mesh)
    parts = {"parameters": state.variables, "batch": (latents, labels)}
    flops = (2 if guidance else 1) * recipe.config.train.batch_size * forward_flops(config)
    arguments = (state.variables, latents, labels, levels, jax.tree.map(lambda _: number, guidance))
    return Planned(program, arguments, parts, flops, 0)


def student_program(recipe: Recipe, mesh: Mesh) -> Planned:
    """One pass of the student that a recipe has, at any guidance weight that it takes; as `sample_program`."""
    student = recipe.student
    assert student is not None
    variables = abstract_state(recipe.train_config, mesh).variables
    latents, labels = _images(recipe, mesh, jnp.float32)
    weight = jax.ShapeDtypeStruct(labels.shape, jnp.float32, sharding=labels.sharding)
    weights = weight if student.max_guidance else None

    def sample(variables: Any, latents: jax.Array, labels: jax.Array, weights: Any) -> jax.Array:
        images, _ = programs.student(student, variables, latents, labels if recipe.model.num_classes else None, weights)
        return images

    program = Program(jax.jit(sample, out_shardings=batch_sharding(mesh)), mesh)
    parts = {"parameters": variables, "batch": (latents, labels)}
    flops = recipe.config.train.batch_size * forward_flops(student.shape)
    return Planned(program, (variables, latents, labels, weights), parts, flops, 0)


def compile_program(planned: Planned, recipe: Recipe, topology: Topology, mesh: Mesh) -> Plan:
    """Compiles and reads the result; a program that does not fit the memory is a plan too.

    Raises jax.errors.JaxRuntimeError if XLA cannot compile it for another reason than memory.
    """
    begin = time.process_time()
    traced = planned.program.trace(*planned.arguments)
    flops = program_flops(traced.jaxpr)
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        problem, temporary_bytes, code_bytes, moved = _shortage(str(error)), math.nan, math.nan, Traffic(math.nan, {})
        seconds = time.process_time() - begin
    else:
        seconds, memory, problem = time.process_time() - begin, compiled.memory_analysis(), ""
        temporary_bytes = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        code_bytes = memory.generated_code_size_in_bytes
        moved = traffic(compiled.as_text(), mesh.size, topology.slices, topology.hosts)
    return Plan(
        topology=topology,
        mesh=dict(mesh.shape),
        batch_size=recipe.config.train.batch_size,
        num_steps=planned.num_steps,
        problem=problem,
        state_bytes={name: _device_bytes(part) for name, part in planned.parts.items()},
        temporary_bytes=temporary_bytes,
        code_bytes=code_bytes,
        flops=flops / mesh.size,
        model_flops=planned.model_flops,
        traffic=moved,
        compile_seconds=seconds,
    )


def _images(recipe: Recipe, mesh: Mesh, dtype: Any) -> tuple[Any, Any]:
    rows = functools.partial(jax.ShapeDtypeStruct, sharding=batch_sharding(mesh))
    count = recipe.config.train.batch_size
    return rows((count, *recipe.model.image_shape), dtype), rows((count,), jnp.int32)


def _device_bytes(tree: Any) -> int:
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _shortage(message: str) -> str:
    """XLA's "Used 20.1G of 15.75G hbm" out of its pages, or their first line."""
    used = re.search(r"Used \S+ of \S+ \w+", message)
    return used[0] if used else message.splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ")
