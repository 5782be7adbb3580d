"""One autoregressive flow block: permute -> causal transformer -> affine map (section 3.1 of the paper)."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tarflow_jax.errors import UserError
from tarflow_jax.flow.conditioning import Conditioning
from tarflow_jax.flow.config import TarFlowConfig
from tarflow_jax.flow.tokens import permute, unpermute
from tarflow_jax.flow.transformer import (
    MLP_EXPANSION,
    Kernels,
    KVCache,
    TransformerLayer,
    gelu,
    kernel_init,
    stacked_layers,
)

Order = jax.Array | np.ndarray
Layers = list[Any]  # the parameters of each layer of a block
Caches = tuple[KVCache, ...]  # one per layer
embedding_init = nn.initializers.normal(0.01)
_WAVE_AMPLITUDE = 0.5  # about that of the projected patches
_LONGEST_WAVE = 100.0  # times 2 π, in patches
_LONGEST_SLOT_WAVE = 1e4  # times 2 π, in slots
_SOFTPLUS_OF_ONE = 0.541324854612918  # the x with softplus(x) = 1
_RMS_EPSILON = 1e-6
_LONGEST_NOISE_WAVE = 1e4  # times 2 π, in units of log σ


class Affine(NamedTuple):
    """Affine map of each token and its inverse: x = scale u + shift, z = (I + L) u; x and z are float32 [B, S, D].

    L is strictly lower triangular, and 0 unless `TarFlowConfig.triangular` is set. A block predicts positive scales;
    guidance may make them negative.
    """

    scale: jax.Array  # float32 [B, S, D]
    shift: jax.Array  # float32 [B, S, D]
    lower: jax.Array | None = None  # entries of L below the diagonal, row by row, float32 [B, S, D (D - 1) / 2]

    def forward(self, x: jax.Array) -> jax.Array:
        """Maps x to z."""
        u = (x - self.shift) / self.scale
        if self.lower is None:
            return u
        # Matmuls with 0/1 matrices, since the gradient of indexing would be a scatter.
        rows, columns = (np.eye(x.shape[2], dtype=np.float32)[i] for i in np.tril_indices(x.shape[2], -1))
        factors = jnp.einsum("BSD,ED->BSE", u, columns, precision="highest")
        return u + jnp.einsum("BSE,ED->BSD", self.lower * factors, rows, precision="highest")

    def inverse(self, z: jax.Array) -> jax.Array:
        """Maps z to x."""
        return solve_unit_lower(self.lower, z) * self.scale + self.shift

    @property
    def token_log_det(self) -> jax.Array:
        """log |det dz / dx| of each token, [B, S] in nats."""
        return -jnp.log(jnp.abs(self.scale)).sum(2)

    def masked(self, exists: jax.Array | None) -> "Affine":
        """Replaces the maps of padding by the identity; `exists` is bool [B, S], or None without padding."""
        if exists is None:
            return self
        scale, shift = jnp.where(exists[..., None], self.scale, 1.0), jnp.where(exists[..., None], self.shift, 0.0)
        return Affine(scale, shift, None if self.lower is None else jnp.where(exists[..., None], self.lower, 0.0))

    def shift_right(self) -> "Affine":
        """Shifts each map to the next token. The first token gets the identity, and the last map is dropped."""

        def move(a: jax.Array, first: float) -> jax.Array:
            return jnp.pad(a[:, :-1], ((0, 0), (1, 0), (0, 0)), constant_values=first)

        return Affine(move(self.scale, 1), move(self.shift, 0), None if self.lower is None else move(self.lower, 0))


def solve_unit_lower(lower: jax.Array | None, z: jax.Array) -> jax.Array:
    """Solves z = (I + L) u for u [B, S, D], with L as in `Affine.lower`; None is L = 0."""
    if lower is None:
        return z
    size = z.shape[2]
    matrix = jnp.zeros((*z.shape, size), z.dtype).at[..., *np.tril_indices(size, -1)].set(lower)
    solve = functools.partial(jax.lax.linalg.triangular_solve, left_side=True, lower=True, unit_diagonal=True)
    return jax.lax.platform_dependent(matrix, z[..., None], cpu=_substitute, default=solve).squeeze(3)


def _substitute(matrix: jax.Array, z: jax.Array) -> jax.Array:
    """Solves for [B, S, D, 1] by forward substitution in D - 1 steps.

    On CPU, XLA's triangular solve calls LAPACK on the same threads that wait for it, so that two concurrent programs
    can deadlock.
    """

    def step(i: int, u: jax.Array) -> jax.Array:
        return u - matrix[..., i, None] * u[..., i, None, :]  # column i of L is 0 in rows 0 … i

    return jax.lax.fori_loop(0, z.shape[2] - 1, step, z)


class FlowBlock(nn.Module):
    """Maps x to z_i = (x_i - shift_i) exp(-log_scale_i), with shift and log_scale predicted from the tokens before i.

    "Block order" is the order [1 or B, T] in which the block reads tokens; "data order" is that of the image or
    sequence. The order is an argument and may be traced, so that blocks of equal depth share one compiled function.

    Attributes:
      config: the whole flow's.
      index: number of the block, which sets its depth and the limit of its inputs.

    Sows `intermediates/token_log_det`: the log_det of each token, [B, T] in data order.
    """

    config: TarFlowConfig
    index: int
    kernels: Kernels = Kernels()

    def setup(self) -> None:
        config = self.config
        dense = functools.partial(nn.Dense, dtype=config.compute_dtype, dot_general=self.kernels.dot_general)
        self.project_in = dense(config.width, kernel_init=kernel_init)
        if config.position_embeddings:
            self.position_embedding = self.param("position_embedding", position_init, config)
        if config.start_token:
            self.start_token = self.param("start_token", nn.initializers.normal(1.0), (config.token_dim,))
        if config.num_classes:
            self.class_embedding = self.param("class_embedding", embedding_init, (config.num_classes, config.width))
        if config.noise_conditional:
            self.noise_in = dense(MLP_EXPANSION * config.width, kernel_init=kernel_init)
            self.noise_out = dense(config.width, kernel_init=kernel_init)
        if config.is_conditioned(self.index):
            if config.standardizes_condition:
                self.null_condition = self.param("null_condition", nn.initializers.zeros, (config.condition_dim,))
            self.condition_in = dense(config.width, kernel_init=kernel_init)
            if config.condition_by_token:
                self.next_condition_in = dense(config.width, kernel_init=kernel_init)
        self.layers = stacked_layers(config, config.depths[self.index], self.kernels)
        if config.final_norm:
            self.final_norm = self.param("final_norm", nn.initializers.zeros, (config.width,))
        self.project_out = dense(config.output_dim, kernel_init=nn.initializers.zeros)  # a new flow is the identity
        if config.triangular:
            self.project_lower = dense(config.triangle_size, kernel_init=nn.initializers.zeros)

    def __call__(self, tokens: jax.Array, order: Order, conditioning: Conditioning) -> tuple[jax.Array, jax.Array]:
        """Encodes tokens [B, T, D]; returns (z [B, T, D], log_det [B] in nats). Tokens and z are in data order."""
        x = permute(tokens, order)
        affine, _ = self.predict(self.prepend_start_token(x)[:, : x.shape[1]], order, conditioning)
        affine = affine if self.config.start_token else affine.shift_right()
        affine = affine.masked(conditioning.exists(jnp.arange(x.shape[1])))
        self.sow("intermediates", "token_log_det", unpermute(affine.token_log_det, order))
        return unpermute(affine.forward(x), order), affine.token_log_det.sum(1)

    def prepend_start_token(self, x: jax.Array) -> jax.Array:
        """Prepends the start token, if there is one, to tokens [B, T, D]."""
        if not self.config.start_token:
            return x
        start = jnp.broadcast_to(self.start_token[None, None], (len(x), 1, x.shape[2]))
        return jnp.concatenate([start, x], axis=1)

    def predict(
        self,
        x: jax.Array,
        order: Order,
        conditioning: Conditioning,
        temperature: jax.Array | None = None,
        layers: Layers | None = None,
        caches: Caches | None = None,
        start: jax.Array | int = 0,
    ) -> tuple[Affine, Caches | None]:
        """Predicts the affine maps of tokens start + 1 … start + S from tokens start … start + S - 1.

        Args:
          x: tokens [B, S, D] in block order, start token included.
          order: block order, int32 [1 or B, T].
          conditioning: standardized.
          temperature: [B], divides the attention logits, or None for 1.
          layers: the parameters of each layer, for a call with caches.
          caches: of the prefix and the tokens before `start`; None for a whole sequence, from token 0.
          start: position of the first token.

        Returns (affine, caches), the caches with these tokens written.
        """
        prefix_length = self.config.prefix_length(self.index)
        h, angles = self._embed(x, order, conditioning, start)
        if caches is not None and layers is not None:
            h, caches = self._through_layers(h, temperature, angles, layers, caches, prefix_length + start)
            return self._project(h), caches

        def prepend(before: jax.Array, x: jax.Array) -> jax.Array:
            return jnp.concatenate([jnp.broadcast_to(before, (len(x), *before.shape[1:])), x], axis=1)

        if prefix_length:
            h, angles = jax.tree.map(prepend, self._embed_prefix(conditioning), (h, angles))
        h, _ = self.layers(h, temperature, angles)
        return self._project(h[:, prefix_length:]), None

    def write_prefix(
        self, conditioning: Conditioning, temperature: jax.Array | None, layers: Layers, caches: Caches
    ) -> Caches:
        """Writes the keys and values of the prefix; arguments as in `predict`."""
        h, angles = self._embed_prefix(conditioning)
        return self._through_layers(h, temperature, angles, layers, caches, 0)[1]

    def _through_layers(
        self,
        h: jax.Array,
        temperature: jax.Array | None,
        angles: jax.Array | None,
        layers: Layers,
        caches: Caches,
        start: jax.Array | int,
    ) -> tuple[jax.Array, Caches]:
        """Applies layers whose parameters are no stack, because slicing one inside a loop would copy every slice."""
        layer, written = TransformerLayer(self.config, self.kernels, parent=None), []
        for params, cache in zip(layers, caches, strict=True):
            h, cache = layer.apply({"params": params}, h, temperature, angles, cache, start)
            written.append(cache)
        return h, tuple(written)

    def _embed(
        self, x: jax.Array, order: Order, conditioning: Conditioning, start: jax.Array | int
    ) -> tuple[jax.Array, jax.Array | None]:
        """Embeds tokens [B, S, D] at positions start … start + S - 1 in block order.

        With a start token, each token takes the position of the one that it predicts.

        Returns (h, angles): the residual stream [B, S, C], and the rotary angles [1 or B, S, H / 2], None without
        `rotary`.
        """
        config, angles = self.config, None
        here = jax.lax.dynamic_slice_in_dim(jnp.asarray(order), start, x.shape[1], axis=1)  # the tokens' numbers
        if limit := config.input_limit if self.index else config.image_limit:
            x = jnp.clip(x, -limit, limit)
        h = self.project_in(x.astype(config.compute_dtype)).astype(jnp.float32)
        if config.position_embeddings:
            h = h + self.position_embedding[here]
        if config.num_classes:
            h = h + class_vectors(self.class_embedding, conditioning.labels, x.shape[0])[:, None]
        if config.noise_conditional:
            h = h + self._noise_vectors(conditioning.noise_std)[:, None]
        if config.standardizes_condition and config.is_conditioned(self.index):
            h = h + self._condition_vectors(conditioning.condition, order, start, x.shape[1])
        if config.rotary:
            angles = jnp.asarray(rotary_angles(config)[config.condition_length :])
            slots = start + jnp.arange(x.shape[1])[None]
            angles = angles[slots if config.rotary_base_size else here]
        return h, angles

    def _embed_prefix(self, conditioning: Conditioning) -> tuple[jax.Array, jax.Array | None]:
        """Embeds a prefix as the residual stream [B, L, C] and rotary angles [1, L, H / 2], None without `rotary`."""
        config = self.config
        assert conditioning.condition is not None
        h = self.condition_in(conditioning.condition.astype(config.compute_dtype)).astype(jnp.float32)
        return h, jnp.asarray(rotary_angles(config)[None, : config.condition_length]) if config.rotary else None

    def _project(self, h: jax.Array) -> Affine:
        """Projects the layers' output [B, S, C] to the affine maps of the next tokens."""
        config = self.config
        if config.final_norm:
            inverse_rms = jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + _RMS_EPSILON)
            h = h * inverse_rms * (1 + self.final_norm)[None, None]
        h = h.astype(config.compute_dtype)

        def outputs(dense: nn.Module) -> jax.Array:
            out, limit = dense(h).astype(jnp.float32), config.output_limit
            return limit * jnp.tanh(out / limit) if limit else out

        out, lower = outputs(self.project_out), outputs(self.project_lower) if config.triangular else None
        if config.volume_preserving:
            return Affine(jnp.ones_like(out), out, lower)
        log_scale, shift = jnp.split(out, 2, axis=-1)
        softplus = config.scale_function == "softplus"
        return Affine(jax.nn.softplus(log_scale + _SOFTPLUS_OF_ONE) if softplus else jnp.exp(log_scale), shift, lower)

    def _condition_vectors(
        self, condition: jax.Array | None, order: Order, start: jax.Array | int, size: int
    ) -> jax.Array:
        """Embeds conditions as [1 or B, 1 or S, C]; a token's embedding includes the next token's condition."""
        config = self.config
        if condition is None:
            tokens = (config.num_tokens,) if config.condition_by_token else ()
            condition = jnp.full((1, *tokens, config.condition_dim), jnp.nan)
        null = self.null_condition.reshape((1,) * (condition.ndim - 1) + (-1,))
        condition = jnp.where(jnp.isnan(condition), null, condition).astype(config.compute_dtype)
        if not config.condition_by_token:
            return self.condition_in(condition).astype(jnp.float32)[:, None]
        order = ahead = jnp.asarray(order)
        if config.start_token:
            order = jnp.concatenate([order[:, :1], order[:, :-1]], axis=1)  # the start token has no condition
        else:
            ahead = jnp.roll(order, -1, axis=1)  # the last token predicts none
        here, there = (
            permute(condition, jax.lax.dynamic_slice_in_dim(numbers, start, size, axis=1)) for numbers in (order, ahead)
        )
        return (self.condition_in(here) + self.next_condition_in(there)).astype(jnp.float32)

    def _noise_vectors(self, noise_std: jax.Array | None) -> jax.Array:
        """Embeds noise levels σ [B] as [B, C]: sines and cosines of log σ through an MLP."""
        if noise_std is None:
            raise UserError("this flow is conditional on the noise level; give it noise_std, σ of each image")
        half = self.config.width // 2
        frequencies = _LONGEST_NOISE_WAVE ** -(jnp.arange(half, dtype=jnp.float32) / half)
        angles = jnp.log(noise_std)[:, None] * frequencies[None]
        features = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1).astype(self.config.compute_dtype)
        return self.noise_out(gelu(self.noise_in(features))).astype(jnp.float32)


def class_vectors(embedding: jax.Array, labels: jax.Array | None, batch_size: int) -> jax.Array:
    """Looks up class embeddings [classes, C] as [B, C]; no class, label -1 or None, gets the mean embedding."""
    mean = embedding.mean(0, keepdims=True)
    if labels is None:
        return jnp.broadcast_to(mean, (batch_size, mean.shape[1]))
    return jnp.where((labels < 0)[:, None], mean, embedding[jnp.maximum(labels, 0)])


def position_init(key: jax.Array, config: TarFlowConfig) -> jax.Array:
    """Initialises position embeddings [T, C], see `TarFlowConfig.position_init`."""
    if config.position_init == "normal":
        return embedding_init(key, (config.num_tokens, config.width))
    rows, columns = config.grid
    frequencies = _LONGEST_WAVE ** -jnp.linspace(0, 1, config.width // 4, endpoint=False)

    def waves(length: int) -> jax.Array:
        angles = jnp.outer(jnp.arange(length, dtype=jnp.float32), frequencies)
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)  # [length, C / 2]

    halves = jnp.repeat(waves(rows), columns, axis=0), jnp.tile(waves(columns), (rows, 1))
    return _WAVE_AMPLITUDE * jnp.concatenate(halves, axis=1)


def rotary_angles(config: TarFlowConfig) -> np.ndarray:
    """Returns the rotary angles, float32 [L + T, H / 2], of a prefix and of the tokens in data order.

    Half of a head's pairs rotate by row, half by column; with a prefix, 3/8 each and 1/4 by position in the prefix.
    """
    (rows, columns), length, base = config.grid, config.condition_length, config.rotary_base_size
    by_side = 3 * config.head_dim // 16 if length else config.head_dim // 4
    longest, unit = (_LONGEST_SLOT_WAVE, base / np.sqrt(rows * columns)) if base else (_LONGEST_WAVE, 1.0)
    unit_before = base / length if base and length else 1.0

    def by(positions: np.ndarray, pairs: int, before: bool = False) -> np.ndarray:
        positions = np.pad(positions, (0, rows * columns) if before else (length, 0))  # the other kind does not rotate
        return np.outer(positions, longest ** -np.linspace(0, 1, pairs, endpoint=False))

    by_row = by(unit * np.repeat(np.arange(rows), columns), by_side)
    by_column = by(unit * np.tile(np.arange(columns), rows), by_side)
    by_prefix = by(unit_before * np.arange(length), config.head_dim // 2 - 2 * by_side, before=True)
    return np.concatenate([by_row, by_column, by_prefix], axis=1).astype(np.float32)
