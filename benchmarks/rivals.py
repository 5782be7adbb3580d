"""Rival implementations of the same work: a checkout of apple/ml-tarflow, and PyPI's transformer-flows."""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import Run
from tarflow_jax.flow import TarFlowConfig


class Reference:
    """The PyTorch reference, read from its checkout; on a GPU where there is one, else on all cores."""

    def __init__(self, checkout: str, config: TarFlowConfig, *, compiled: bool = False) -> None:
        if not Path(checkout, "transformer_flow.py").is_file():
            raise FileNotFoundError(
                f"{checkout}/transformer_flow.py not found; expected a checkout of apple/ml-tarflow"
            )
        sys.path.insert(0, checkout)
        import torch
        import transformer_flow

        self.torch, self.config = torch, config
        torch.set_num_threads(os.cpu_count() or 1)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = transformer_flow.Model(
            in_channels=config.image_channels,
            img_size=config.image_size[0],
            patch_size=config.patch_size,
            channels=config.width,
            num_blocks=config.num_blocks,
            layers_per_block=config.depths[0],
            nvp=not config.volume_preserving,
            num_classes=config.num_classes,
        ).to(self.device)
        self.forward = torch.compile(self.model) if compiled else self.model

    def _tensors(self, images: np.ndarray, labels: np.ndarray) -> tuple[Any, Any]:
        x = self.torch.tensor(np.moveaxis(images, -1, 1), device=self.device)
        y = self.torch.tensor(labels, dtype=self.torch.long, device=self.device)
        return x, y if self.config.num_classes else None

    def _autocast(self) -> Any:
        enabled = self.config.dtype == "bfloat16"
        return self.torch.autocast(self.device, dtype=self.torch.bfloat16, enabled=enabled)

    def _done(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def training(self, images: np.ndarray, labels: np.ndarray) -> Run:
        """A step: noise, forward, backward, AdamW."""
        optimizer = self.torch.optim.AdamW(self.model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=1e-4)
        clean, y = self._tensors(images, labels)

        def run() -> None:
            x = clean + 0.1 * self.torch.randn_like(clean)
            optimizer.zero_grad()
            with self._autocast():
                z, _, log_det = self.forward(x, y)
                loss = self.model.get_loss(z, log_det)
            loss.backward()
            optimizer.step()
            self._done()

        return run

    def sampling(self, latents: np.ndarray, labels: np.ndarray, weight: float) -> Run:
        tokens = self.model.patchify(self._tensors(latents, labels)[0])
        y = self._tensors(latents, labels)[1]

        def run() -> None:
            with self.torch.inference_mode(), self._autocast():
                self.model.reverse(tokens, y, guidance=weight, guide_what="ab")
            self._done()

        return run

    def denoising(self, images: np.ndarray, labels: np.ndarray, std: float) -> Run:
        """As its evaluate_fid.py: the gradient of the batch's loss, scaled back."""
        x, y = self._tensors(images, labels)

        def run() -> Any:
            noisy = x.detach().requires_grad_()
            z, _, log_det = self.model(noisy, y)
            loss = self.model.get_loss(z, log_det) * self.config.num_dims * len(x)
            (gradient,) = self.torch.autograd.grad(loss, [noisy])
            self._done()
            return noisy.detach() - std**2 * gradient

        return run


class Peer:
    """transformer-flows of PyPI (Equinox); unconditional, for its class conditioning is another network."""

    def __init__(self, config: TarFlowConfig) -> None:
        import equinox as eqx
        from transformer_flows.transformer_flow import TransformerFlow

        self.eqx, self.config = eqx, dataclasses.replace(config, num_classes=0)
        self.model, self.state = eqx.nn.make_with_state(TransformerFlow)(
            n_channels=config.image_channels,
            img_size=config.image_size[0],
            patch_size=config.patch_size,
            channels=config.width,
            n_blocks=config.num_blocks,
            layers_per_block=config.depths[0],
            head_dim=config.head_dim,
            key=jax.random.key(0),
        )

    def training(self, images: np.ndarray) -> Run:
        import optax

        optimizer = optax.adamw(1e-3, b1=0.9, b2=0.95, weight_decay=1e-4)
        x = jnp.moveaxis(jnp.asarray(images), -1, 1)

        @self.eqx.filter_jit(donate="all")
        def step(model: Any, opt_state: Any, key: jax.Array) -> Any:
            noisy = x + 0.1 * jax.random.normal(key, x.shape)

            def loss(model: Any) -> jax.Array:
                return -jax.vmap(lambda image: model.log_prob(image, None))(noisy).mean()

            gradients = self.eqx.filter_grad(loss)(model)
            updates, opt_state = optimizer.update(
                gradients, opt_state, self.eqx.filter(model, self.eqx.is_inexact_array)
            )
            return self.eqx.apply_updates(model, updates), opt_state

        model = jax.tree.map(lambda x: x.copy() if self.eqx.is_array(x) else x, self.model)
        carry = [model, optimizer.init(self.eqx.filter(model, self.eqx.is_inexact_array))]

        def run() -> Any:
            carry[:] = step(*carry, jax.random.key(0))
            return self.eqx.filter(carry[0], self.eqx.is_array)

        return run

    def sampling(self, latents: np.ndarray) -> Run:
        from transformer_flows.transformer_flow import sample_model

        tokens = jax.vmap(self.model.patchify)(jnp.moveaxis(jnp.asarray(latents), -1, 1))
        return lambda: sample_model(self.model, tokens, None, self.state)
