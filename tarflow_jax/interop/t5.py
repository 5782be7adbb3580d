"""Loads T5 encoders with the package transformers, which needs PyTorch."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tarflow_jax.errors import MissingPackageError, UserError, one_line


def load_t5(name: str) -> tuple[Any, Any, int]:
    """Loads a T5 encoder from a folder or the hub; returns the network, the tokenizer and the width.

    Raises MissingPackageError without transformers, UserError if loading fails.
    """
    try:
        import transformers
    except ImportError as error:
        message = "a T5 needs transformers and PyTorch; pip install transformers sentencepiece torch"
        raise MissingPackageError(message) from error
    try:
        network = transformers.T5EncoderModel.from_pretrained(name, use_safetensors=True).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except Exception as error:  # transformers raises nearly anything
        raise UserError(f"{name} is no T5 that transformers can load: {one_line(error)}") from error
    return network, tokenizer, network.config.d_model


def t5_embeddings(network: Any, tokenizer: Any, captions: Sequence[str], length: int) -> np.ndarray:
    """Embeds captions: float32 [B, length, E], zeros after their tokens, the last of which marks the end."""
    import torch

    tokens = tokenizer(list(captions), max_length=length, padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        found = network(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
    found = found * tokens.attention_mask[:, :, None]
    return found.float().numpy()
