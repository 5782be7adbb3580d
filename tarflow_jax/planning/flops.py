"""Floating-point work of matrix products: of a model in arithmetic, of a program by reading its jaxpr.

XLA's own count (`cost_analysis`) takes the body of a loop once, and the layers run in a loop.
"""

import math
from typing import Any

import jax.numpy as jnp
from jax.interpreters.partial_eval import dce_jaxpr

from tarflow_jax.flow import TarFlowConfig


def forward_flops(config: TarFlowConfig) -> float:
    """Multiplications and additions of one image's matrix products, encoded; attention counted whole."""
    tokens, width = config.num_tokens, config.width
    outputs = config.token_dim * (1 if config.volume_preserving else 2)
    triangle = config.triangle_size if config.triangular else 0
    ends = config.num_blocks * (width * (config.token_dim + outputs + triangle) + 2 * config.token_dim * triangle)
    layers = sum(config.depths) * (12 * width**2 + 2 * tokens * width)
    return 2.0 * tokens * (ends + layers)


def program_flops(jaxpr: Any) -> float:
    """FLOPs of all products that a jaxpr runs on all devices together, loops by their lengths.

    What the backward pass computes again is counted. Elementwise work is not, nor what no result needs. Raises
    ValueError for products in a loop whose length the jaxpr does not say.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    live, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _all_flops(live)


def _all_flops(jaxpr: Any) -> float:
    return sum(_flops(equation) for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns)


def _flops(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        summed = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        return 2.0 * summed * math.prod(equation.outvars[0].aval.shape)
    if name == "cond":
        return max(map(_all_flops, params["branches"]))
    inner = sum(map(_all_flops, _inner(params)))
    if name == "while" and inner:
        raise ValueError("a program's loop of unknown length holds matrix products; its FLOPs cannot be counted")
    if name == "scan":
        return inner * params["length"]
    if name == "shard_map":  # the shapes inside are one device's
        return inner * params["mesh"].size
    if name.startswith("dot_product_attention"):  # cuDNN's, flow.attention's only use of it: in blocks too
        batch, tokens, heads, dim = equation.invars[0].aval.shape
        products = 2 if "fwd" in name else 5  # backwards, the logits once more
        share = _share_of_blocks(-(-tokens // 128), params["mask_type"].name == "CAUSAL")
        return products * 2.0 * batch * heads * tokens**2 * dim * share
    if name == "pallas_call":
        # The only kernel is flow.attention.splash. If it is causal, it is given the queries' positions.
        grid = params["grid_mapping"].grid
        causal = any(variable.aval.dtype == jnp.int32 for variable in equation.invars)
        return inner * math.prod(grid) * _share_of_blocks(grid[-1], causal)
    return inner


def _share_of_blocks(count: int, causal: bool) -> float:
    """Of count x count blocks of logits, those that run."""
    return (count + 1) / (2 * count) if causal else 1.0


def _inner(params: dict[str, Any]) -> list[Any]:
    values = [v for value in params.values() for v in (value if isinstance(value, tuple | list) else [value])]
    return [value for value in values if hasattr(value, "eqns") or hasattr(value, "jaxpr")]
