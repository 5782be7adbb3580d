"""The programs of a recipe, compiled for devices that need not exist: its training step and its sampler."""

import dataclasses
import functools
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tarflow_jax.flow import TarFlow
from tarflow_jax.planning.chips import Topology
from tarflow_jax.planning.flops import forward_flops, program_flops
from tarflow_jax.planning.plan import Plan
from tarflow_jax.planning.traffic import Traffic, traffic
from tarflow_jax.runtime import batch_sharding, replicated
from tarflow_jax.sampling import Guidance, decode
from tarflow_jax.training import Recipe
from tarflow_jax.training.state import abstract_state
from tarflow_jax.training.step import recipe_step


@dataclasses.dataclass(frozen=True)
class Program:
    """A function and the shapes, dtypes and shardings of its arguments, by what they are."""

    jitted: Any
    arguments: tuple[Any, ...]
    parts: dict[str, Any]
    model_flops: float  # of the whole batch, nothing computed twice
    num_steps: int  # of the whole recipe; 0 for a sampler, which has no end


def train_program(recipe: Recipe, mesh: Mesh) -> Program:
    """The step that `training.train` runs.

    Raises:
      ValueError: the batch or a parameter cannot be cut over the mesh.
    """
    fields, batch = recipe.config.train, _images(recipe, mesh, jnp.uint8)
    step, state = recipe_step(recipe, mesh)
    return Program(
        step,
        (state, *batch, _replicated(mesh, jax.eval_shape(lambda: jax.random.key(0)))),
        {
            "parameters": state.variables,
            "optimizer": (state.step, state.opt_state),
            "average": state.ema_params,
            "batch": batch,
        },
        3 * fields.batch_size * forward_flops(recipe.model),
        fields.num_steps,
    )


def sample_program(recipe: Recipe, mesh: Mesh) -> Program:
    """The sequential decoder with the recipe's guidance, for as many images as a training batch has.

    Raises:
      ValueError: as of `train_program`.
    """
    config = recipe.model
    state = abstract_state(TarFlow(config), recipe.optimizer(), mesh, ema=False)
    latents, labels = _images(recipe, mesh, jnp.float32)
    guidance = Guidance(**recipe.config.sample.guidance)
    weights = None
    if guidance.weight:
        weights = _replicated(mesh, jax.ShapeDtypeStruct((config.num_tokens,), jnp.float32))

    def sample(variables: Any, latents: jax.Array, labels: jax.Array, weights: jax.Array | None) -> jax.Array:
        with jax.default_matmul_precision("highest" if config.dtype == "float32" else "default"):
            given = labels if config.num_classes else None
            return decode(
                config, variables, latents, given, weights, guidance.attention_temperature, guidance.target
            ).images

    passes = 2 if guidance.weight else 1
    return Program(
        jax.jit(sample, out_shardings=batch_sharding(mesh)),
        (state.variables, latents, labels, weights),
        {"parameters": state.variables, "batch": (latents, labels)},
        passes * recipe.config.train.batch_size * forward_flops(config),
        0,
    )


def compile_program(program: Program, recipe: Recipe, topology: Topology, mesh: Mesh) -> Plan:
    """Compiles and reads the result; a program that does not fit the memory is a plan too.

    Raises:
      jax.errors.JaxRuntimeError: XLA cannot compile it for another reason than memory.
    """
    described = functools.partial(
        Plan,
        topology=topology,
        mesh=dict(mesh.shape),
        batch_size=recipe.config.train.batch_size,
        num_steps=program.num_steps,
        state_bytes={name: _device_bytes(part) for name, part in program.parts.items()},
        model_flops=program.model_flops,
    )
    begin = time.process_time()
    with jax.set_mesh(mesh):  # as in training
        traced = program.jitted.trace(*program.arguments)
        flops = program_flops(traced.jaxpr)
        try:
            compiled = traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return described(
                problem=_shortage(str(error)),
                temporary_bytes=math.nan,
                code_bytes=math.nan,
                flops=flops / mesh.size,
                traffic=Traffic(math.nan, {}),
                compile_seconds=time.process_time() - begin,
            )
    seconds, memory = time.process_time() - begin, compiled.memory_analysis()
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return described(
        problem="",
        temporary_bytes=memory.temp_size_in_bytes + outputs,
        code_bytes=memory.generated_code_size_in_bytes,
        flops=flops / mesh.size,
        traffic=traffic(compiled.as_text(), mesh.size, topology.slices),
        compile_seconds=seconds,
    )


def _images(recipe: Recipe, mesh: Mesh, dtype: Any) -> tuple[Any, Any]:
    rows, count = batch_sharding(mesh), recipe.config.train.batch_size
    return (
        jax.ShapeDtypeStruct((count, *recipe.model.image_shape), dtype, sharding=rows),
        jax.ShapeDtypeStruct((count,), jnp.int32, sharding=rows),
    )


def _replicated(mesh: Mesh, shape: Any) -> Any:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=replicated(mesh))


def _device_bytes(tree: Any) -> int:
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _shortage(message: str) -> str:
    """XLA's "Used 20.1G of 15.75G hbm" out of its pages, or their first line."""
    used = re.search(r"Used \S+ of \S+ \w+", message)
    return used[0] if used else message.splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ")
