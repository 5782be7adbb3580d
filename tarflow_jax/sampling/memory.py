"""Bytes of activations an image takes: rough, for choosing batches that fit."""

from tarflow_jax.flow import TarFlowConfig


def forward_bytes(config: TarFlowConfig) -> int:
    """One layer's live activations: the residual stream, qkv, the MLP's hidden layer, attention logits."""
    return 4 * config.num_tokens * (16 * config.width + 2 * config.num_heads * config.num_tokens)


def backward_bytes(config: TarFlowConfig) -> int:
    """Every layer's activations, kept for the gradient; with remat "full", one residual stream a layer."""
    if config.remat == "full":
        return forward_bytes(config) + 4 * sum(config.depths) * config.num_tokens * config.width
    return sum(config.depths) * forward_bytes(config)


def decode_bytes(config: TarFlowConfig, *, guided: bool, parallel: bool) -> int:
    """A block's key/value caches, as much again for their copies, and what parallel updates of all tokens need."""
    passes = 2 if guided else 1
    caches = max(config.depths) * 2 * 4 * config.num_tokens * config.width * 2
    return passes * (caches + (forward_bytes(config) if parallel else 0))
