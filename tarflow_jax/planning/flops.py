"""Counts the FLOPs of matmuls from jaxprs.

XLA's `cost_analysis` counts the body of a loop only once, and the layers run in a loop.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters.partial_eval import dce_jaxpr

from tarflow_jax.flow import Conditioning, TarFlow, TarFlowConfig


def forward_flops(config: TarFlowConfig) -> float:
    """Returns the FLOPs of encoding one image, with full (unmasked) attention."""
    flow, image = TarFlow(config), jax.ShapeDtypeStruct((1, *config.data_shape), jnp.float32)
    levels = jax.ShapeDtypeStruct((1,), jnp.float32) if config.noise_conditional else None
    variables = jax.eval_shape(flow.init, jax.random.key(0), image, Conditioning(noise_std=levels))
    return program_flops(jax.make_jaxpr(flow.apply)(variables, image, Conditioning(noise_std=levels)))


def program_flops(jaxpr: Any) -> float:
    """Returns the FLOPs of a jaxpr on all devices together, with recomputation but without dead code.

    Counts full attention, though kernels skip what a mask hides. Raises ValueError for a loop of unknown length.
    """
    live, _ = dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))
    return sum(map(_flops, live.eqns))


def _flops(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        summed = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        return 2.0 * summed * math.prod(equation.outvars[0].aval.shape)
    if name.startswith("dot_product_attention"):  # cuDNN's: two matmuls forward, five backward
        batch, tokens, heads, dim = equation.invars[0].aval.shape
        return (2 if "fwd" in name else 5) * 2.0 * batch * heads * tokens**2 * dim
    bodies = [sum(map(_flops, value.eqns)) for value in jax.tree.leaves(params) if hasattr(value, "eqns")]
    if name == "cond":
        return max(bodies)
    if name == "while" and sum(bodies):
        raise ValueError("a loop without a static length contains matmuls; their FLOPs cannot be counted")
    if name == "scan":
        return params["length"] * sum(bodies)
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid) * sum(bodies)
    if name == "shard_map":  # the shapes inside are those of one device
        return params["mesh"].size * sum(bodies)
    return sum(bodies)
