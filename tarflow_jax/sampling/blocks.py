"""The blocks of a flow as the inverses take them, those that are alike in one compiled loop."""

import itertools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from tarflow_jax.flow import FlowBlock, TarFlowConfig, in_block_order, unstack_layers
from tarflow_jax.flow.attention import device_kind
from tarflow_jax.runtime import for_products, gathered
from tarflow_jax.sampling.guidance import Guidance, GuidedBlock

_UNROLLED_TOKENS = 256  # at most, on a TPU


def alike(config: TarFlowConfig, decoders: tuple[Any, ...], guidance: Guidance | None) -> list[range]:
    """All block numbers, in runs of blocks whose inverses are one function of different parameters and tokens."""

    def kind(k: int) -> tuple[Any, ...]:
        limit = config.input_limit if k else config.image_limit
        return config.depths[k], limit, decoders[k], guidance is None or guidance.covers(k, config.num_blocks)

    runs = [list(numbers) for _, numbers in itertools.groupby(range(config.num_blocks), kind)]
    return [range(run[0], run[-1] + 1) for run in runs]


def stacked_blocks(config: TarFlowConfig, params: dict[str, Any], numbers: range) -> dict[str, Any]:
    """The parameters of some blocks of one depth, stacked: one copy of them, in the dtype that they are used in."""
    blocks = [_prepared(config, k, params[f"block_{k}"]) for k in numbers]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)


def of_stack(
    config: TarFlowConfig,
    k: int,
    prepared: dict[str, Any],
    labels: jax.Array | None,
    guidance: Guidance | None,
    noise_std: jax.Array | None,
) -> GuidedBlock:
    """A block of a run of `alike` ones to which block number k belongs, from its part of `stacked_blocks`."""
    own, decoding = gathered(prepared), layers_as(config.num_tokens)
    if decoding == "unrolled":
        own = unstack_layers(own, config.depths[k])
    if guidance is not None and not guidance.covers(k, config.num_blocks):
        guidance = None
    return GuidedBlock(FlowBlock(config, k, decoding), own, labels, noise_std, guidance)


def layers_as(num_tokens: int) -> Literal["unrolled", "looped"]:
    """How the layers run on the device (see `FlowBlock.decoding`).

    CPUs and GPUs copy the slices that a TPU reads where they are. Layers of few tokens, whose caches have few lengths,
    are soon compiled unrolled, and XLA would move a whole stack of kernels to the chip for every token.
    """
    return "looped" if device_kind().startswith("TPU") and num_tokens > _UNROLLED_TOKENS else "unrolled"


def guided_block(
    config: TarFlowConfig,
    params: dict[str, Any],
    k: int,
    labels: jax.Array | None,
    guidance: Guidance | None,
    noise_std: jax.Array | None = None,
) -> GuidedBlock:
    """Block number k with its own parameters, ready to be inverted; arguments as of `decode`."""
    return of_stack(config, k, _prepared(config, k, params[f"block_{k}"]), labels, guidance, noise_std)


def _prepared(config: TarFlowConfig, k: int, block_params: dict[str, Any]) -> dict[str, Any]:
    """A block's parameters in block order; what dense layers compute with in the dtype of their products."""
    return in_block_order(config, k, for_products(block_params, config.compute_dtype))
