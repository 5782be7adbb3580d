"""One autoregressive flow block: permute -> causal transformer -> affine map (section 3.1 of the paper)."""

import functools
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tarflow_jax.errors import UserError
from tarflow_jax.flow.attention import ATTENDED
from tarflow_jax.flow.config import TarFlowConfig
from tarflow_jax.flow.permutation import permute
from tarflow_jax.flow.product import PRODUCT, dense_product
from tarflow_jax.flow.transformer import MLP_EXPANSION, Caches, StackedCache, TransformerLayer, gelu, kernel_init

embedding_init = nn.initializers.normal(0.01)
_WAVE_AMPLITUDE = 0.5  # as large as the projected patches
_LONGEST_WAVE = 100.0  # times 2 π, in patches
_LONGEST_NOISE_WAVE = 1e4  # times 2 π, in units of log σ
_REMAT = {  # what the backward pass finds; all else of a layer it computes again
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT, ATTENDED),
    "attention": jax.checkpoint_policies.save_only_these_names(ATTENDED),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Affine(NamedTuple):
    """z = (I + L) u with u = (x - shift) exp(-log_scale), and its inverse; x and z float32 [B, S, D].

    Section 3.1 of the paper, where L = 0; otherwise (see `TarFlowConfig.triangular`) it is strictly lower triangular.
    """

    log_scale: jax.Array  # float32 [B, S, D]
    shift: jax.Array  # float32 [B, S, D]
    lower: jax.Array | None = None  # L's numbers below the diagonal, row by row, float32 [B, S, D (D - 1) / 2]

    def forward(self, x: jax.Array) -> jax.Array:
        u = (x - self.shift) * jnp.exp(-self.log_scale)
        if self.lower is None:
            return u
        # Products with matrices of zeros and ones: the gradient of indexing would be a scatter.
        rows, columns = (np.eye(x.shape[2], dtype=np.float32)[i] for i in np.tril_indices(x.shape[2], -1))
        factors = jnp.einsum("BSD,ED->BSE", u, columns, precision="highest")
        return u + jnp.einsum("BSE,ED->BSD", self.lower * factors, rows, precision="highest")

    def inverse(self, z: jax.Array) -> jax.Array:
        return solve_unit_lower(self.lower, z) * jnp.exp(self.log_scale) + self.shift

    @property
    def log_det(self) -> jax.Array:
        """log |det dz / dx|, [B] in nats."""
        return -self.log_scale.sum((1, 2))


def solve_unit_lower(lower: jax.Array | None, z: jax.Array) -> jax.Array:
    """u [B, S, D] of z = (I + L) u, L given as `Affine.lower`; z where that is None."""
    if lower is None:
        return z
    size = z.shape[2]
    matrix = jnp.zeros((*z.shape, size), z.dtype).at[..., *np.tril_indices(size, -1)].set(lower)
    return jax.lax.platform_dependent(matrix, z, cpu=_substitute, default=_solve)


def _solve(matrix: jax.Array, z: jax.Array) -> jax.Array:
    solved = jax.lax.linalg.triangular_solve(matrix, z[..., None], left_side=True, lower=True, unit_diagonal=True)
    return solved.squeeze(3)


def _substitute(matrix: jax.Array, z: jax.Array) -> jax.Array:
    """The same in D - 1 steps. On a CPU XLA calls LAPACK, batch by batch on the threads that wait for it: two programs
    that run at a time then wait for each other for ever."""

    def step(i: int, u: jax.Array) -> jax.Array:
        return u - matrix[..., i] * u[..., i, None]  # [B, S, D], column i of L is 0 down to its row i

    return jax.lax.fori_loop(0, z.shape[2] - 1, step, z)


class FlowBlock(nn.Module):
    """z_i = (x_i - shift_i) exp(-log_scale_i), shift and log_scale functions of the tokens before i.

    Attributes:
      config: of the whole flow.
      index: the block's number; odd blocks read the tokens backwards.
      decoding: None, or how layers run that take key/value caches: "unrolled", as modules `layers_0`, `layers_1`, … of
        their own (`unstack_layers` makes their parameters), or "looped", over stacked parameters and caches, which is
        quicker to compile, for devices that read slices where they are. Both have parameters `in_block_order`.

    Sows `intermediates/token_log_det`: each token's part of log_det, [B, T] in image order.
    """

    config: TarFlowConfig
    index: int
    decoding: Literal["unrolled", "looped"] | None = None

    def setup(self) -> None:
        config, depth = self.config, self.config.depths[self.index]
        outputs = config.token_dim * (1 if config.volume_preserving else 2)
        dense = functools.partial(nn.Dense, dtype=config.compute_dtype, dot_general=dense_product)
        self.project_in = dense(config.width, kernel_init=kernel_init)
        self.position_embedding = self.param("position_embedding", position_init, config)
        if config.num_classes:
            self.class_embedding = self.param("class_embedding", embedding_init, (config.num_classes, config.width))
        if config.noise_conditional:
            self.noise_in = dense(MLP_EXPANSION * config.width, kernel_init=kernel_init)
            self.noise_out = dense(config.width, kernel_init=kernel_init)
        self.project_out = dense(outputs, kernel_init=nn.initializers.zeros)  # a new flow is the identity
        if config.triangular:
            self.project_lower = dense(config.triangle_size, kernel_init=nn.initializers.zeros)
        if config.rotary:
            angles = rotary_angles(config)
            self.rotary_angles = self.param("rotary_angles", lambda _: jnp.asarray(angles)) if self.decoding else angles
        self.layers: Any = (
            [TransformerLayer(config) for _ in range(depth)]
            if self.decoding == "unrolled"
            else scanned_layers(config, depth)
        )

    def __call__(
        self, tokens: jax.Array, labels: jax.Array | None = None, noise_std: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Forward: tokens [B, T, D] in image order -> (z [B, T, D] in image order, log_det [B] in nats)."""
        x = permute(tokens, self.index)
        affine = self.affine(x, labels, noise_std=noise_std)
        self.sow("intermediates", "token_log_det", permute(-affine.log_scale.sum(2), self.index))
        return permute(affine.forward(x), self.index), affine.log_det

    def affine(
        self,
        x: jax.Array,
        labels: jax.Array | None = None,
        temperature: jax.Array | None = None,
        noise_std: jax.Array | None = None,
    ) -> Affine:
        """Of tokens x [B, T, D] in block order; zero for the first."""
        following, _ = self.following_affine(x, labels, temperature, noise_std)
        return jax.tree.map(lambda a: jnp.pad(a[:, :-1], ((0, 0), (1, 0), (0, 0))), following)

    def following_affine(
        self,
        x: jax.Array,
        labels: jax.Array | None = None,
        temperature: jax.Array | None = None,
        noise_std: jax.Array | None = None,
        caches: Caches | None = None,
        start: jax.Array | int = 0,
    ) -> tuple[Affine, Caches | None]:
        """What the tokens at start .. start + S - 1 say of the ones that follow each of them.

        Args:
          x: tokens [B, S, D] in block order.
          labels: int32 [B], -1 for no class, or None for no class anywhere.
          temperature: [B], divides the attention logits, or None for 1.
          noise_std: σ [B] of a flow that is conditional on it.
          caches: holding the tokens before `start`: one a layer (unrolled), or one of all layers (looped).
          start: position of the first token, in block order.

        Returns (affine, caches): of the tokens start + 1 .. start + S.
        """
        if limit := self.config.input_limit if self.index else self.config.image_limit:
            x = jnp.clip(x, -limit, limit)
        h = self.project_in(x.astype(self.config.compute_dtype)).astype(jnp.float32)
        h = h + self._at(self.position_embedding, start, x.shape[1])[None]
        if self.config.num_classes:
            h = h + class_vectors(self.class_embedding, labels, x.shape[0])[:, None]
        if self.config.noise_conditional:
            h = h + self._noise_vectors(noise_std)[:, None]
        angles = self._at(jnp.asarray(self.rotary_angles), start, x.shape[1]) if self.config.rotary else None
        if self.decoding == "unrolled":
            written = []
            for layer, cache in zip(self.layers, caches or (None,) * len(self.layers), strict=True):
                h, cache = layer(h, temperature, angles, cache, start)
                written.append(cache)
            caches = tuple(written) if caches else None
        elif isinstance(caches, StackedCache):
            h, caches = self._loop(h, temperature, angles, caches, start)
        else:
            h, _ = self.layers(h, temperature, angles)
        h = h.astype(self.config.compute_dtype)
        out = self.project_out(h).astype(jnp.float32)
        log_scale, shift = (jnp.zeros_like(out), out) if self.config.volume_preserving else jnp.split(out, 2, axis=-1)
        lower = self.project_lower(h).astype(jnp.float32) if self.config.triangular else None
        return Affine(log_scale, shift, lower), caches

    def _loop(
        self,
        h: jax.Array,
        temperature: jax.Array | None,
        angles: jax.Array | None,
        caches: StackedCache,
        start: jax.Array | int,
    ) -> tuple[jax.Array, StackedCache]:
        stacked = self.variables["params"]["layers"]
        layer = TransformerLayer(self.config, parent=None)

        def step(i: jax.Array, carry: tuple[jax.Array, StackedCache]) -> tuple[jax.Array, StackedCache]:
            h, caches = carry
            own = jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, i, keepdims=False), stacked)
            return layer.apply({"params": own}, h, temperature, angles, caches.replace(layer=i), start)

        return jax.lax.fori_loop(0, self.config.depths[self.index], step, (h, caches))

    def _at(self, table: jax.Array, start: jax.Array | int, length: int) -> jax.Array:
        """The rows of a table [T, …] for `length` tokens from position `start`, in block order."""
        return jax.lax.dynamic_slice_in_dim(
            table if self.decoding else permute(table, self.index, axis=0), start, length
        )

    def _noise_vectors(self, noise_std: jax.Array | None) -> jax.Array:
        """Embeddings [B, C] of noise levels σ [B]: sines and cosines of log σ through a perceptron of two layers."""
        if noise_std is None:
            raise UserError("this flow is conditional on the noise level; give it noise_std, σ of each image")
        half = self.config.width // 2
        frequencies = _LONGEST_NOISE_WAVE ** -(jnp.arange(half, dtype=jnp.float32) / half)
        angles = jnp.log(noise_std)[:, None] * frequencies[None]
        features = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1).astype(self.config.compute_dtype)
        return self.noise_out(gelu(self.noise_in(features))).astype(jnp.float32)


def class_vectors(embedding: jax.Array, labels: jax.Array | None, batch_size: int) -> jax.Array:
    """Rows [B, C] of class embeddings [classes, C]; no class, label -1 or None, is the mean of them all."""
    mean = embedding.mean(0, keepdims=True)
    if labels is None:
        return jnp.broadcast_to(mean, (batch_size, mean.shape[1]))
    return jnp.where((labels < 0)[:, None], mean, embedding[jnp.maximum(labels, 0)])


def position_init(key: jax.Array, config: TarFlowConfig) -> jax.Array:
    """Position embeddings [T, C] of a new model, see `TarFlowConfig.position_init`."""
    if config.position_init == "normal":
        return embedding_init(key, (config.num_tokens, config.width))
    rows, columns = (side // config.patch_size for side in config.image_size)
    frequencies = _LONGEST_WAVE ** -jnp.linspace(0, 1, config.width // 4, endpoint=False)

    def waves(length: int) -> jax.Array:
        angles = jnp.outer(jnp.arange(length, dtype=jnp.float32), frequencies)
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)  # [length, C / 2]

    halves = jnp.repeat(waves(rows), columns, axis=0), jnp.tile(waves(columns), (rows, 1))
    return _WAVE_AMPLITUDE * jnp.concatenate(halves, axis=1)


def rotary_angles(config: TarFlowConfig) -> np.ndarray:
    """Angles float32 [T, H / 2] by which a head's pairs turn: half of them by a patch's row, half by its column."""
    rows, columns = (side // config.patch_size for side in config.image_size)
    frequencies = _LONGEST_WAVE ** -np.linspace(0, 1, config.head_dim // 4, endpoint=False)
    by_row = np.outer(np.repeat(np.arange(rows), columns), frequencies)
    by_column = np.outer(np.tile(np.arange(columns), rows), frequencies)
    return np.concatenate([by_row, by_column], axis=1).astype(np.float32)


def scanned_layers(config: TarFlowConfig, depth: int, causal: bool = True, name: str | None = None) -> nn.Module:
    """`depth` layers with stacked parameters, one `nn.scan`: (x, temperature, angles) -> (x, None)."""
    layer: Any = TransformerLayer
    if config.remat != "none":
        layer = nn.remat(layer, policy=_REMAT[config.remat], prevent_cse=False)
    axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "in_axes": nn.broadcast}
    return nn.scan(layer, **axes, length=depth)(config, causal, name=name)


def in_block_order(config: TarFlowConfig, index: int, block_params: dict[str, Any]) -> dict[str, Any]:
    """The parameters of block number `index` with all that depends on its direction among them (see `decoding`).

    These are the tables of positions, in the order in which the block reads tokens. So blocks of one depth are one
    function of different parameters.
    """
    tables = {"position_embedding": block_params["position_embedding"]}
    if config.rotary:
        tables["rotary_angles"] = jnp.asarray(rotary_angles(config))
    return block_params | {name: permute(table, index, axis=0) for name, table in tables.items()}


def unstack_layers(block_params: dict[str, Any], depth: int) -> dict[str, Any]:
    """A block's parameters with the stacked `layers` split into `layers_0`, `layers_1`, … (see FlowBlock.decoding)."""
    params = {name: value for name, value in block_params.items() if name != "layers"}
    for i in range(depth):
        params[f"layers_{i}"] = jax.tree.map(lambda p, i=i: p[i], block_params["layers"])
    return params
