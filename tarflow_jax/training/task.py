"""Tasks that the loop can train: each defines initial variables, a loss and a test loss.

`FlowTask` trains a flow of images or latents by maximum likelihood, `ArrayTask` one of sequences, `StudentTask` a
student to invert a flow, `AutoencoderTask` an autoencoder.
"""

import dataclasses
import functools
import math
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from tarflow_jax.autoencoder import AutoencoderConfig, AutoencoderKL
from tarflow_jax.data import Arrays, ImageSource, Latents, SequenceSource
from tarflow_jax.errors import UserError
from tarflow_jax.flow import Conditioning, TarFlow, TarFlowConfig
from tarflow_jax.likelihood import training_loss, unit_prior
from tarflow_jax.noise import Noise, to_float
from tarflow_jax.options import Options, option
from tarflow_jax.runtime import BatchRunner, LazyBatch, device_flow, training_kernels
from tarflow_jax.runtime.batch_runner import forward_bytes
from tarflow_jax.sampling import guided_trajectory
from tarflow_jax.scoring import dataset_log_prob, loss_of, sequence_log_prob
from tarflow_jax.student import Student, StudentConfig, distillation_loss
from tarflow_jax.student.loss import perceptual_distance

Variables = dict[str, Any]
Metrics = dict[str, jax.Array]
Batch = tuple[Any, ...]  # trees of arrays [B, …]
ENCODER = ("encoder", "quant_conv")  # parameters of an autoencoder that its decoder does not use
PRIOR_RATE = 0.1  # of the running mean in `updated_prior`
_TEST_LEVELS = 8  # noise levels in a test loss


class Frozen(NamedTuple):
    """Parameters that a task reads and training does not change; None for those that its loss does not need."""

    flow: Any = None  # variables of a student's flow
    perception: Any = None  # parameters of the `Perception`
    encoder: Any = None  # parameters of an autoencoder's encoder, if only its decoder is trained


class Task(Protocol):
    """The interface of a task, and its base class. Tasks are hashable, because compiled programs are cached by them."""

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the matmuls."""

    def init(self, key: jax.Array) -> Variables:
        """Returns the initial variables: `params`, and whatever else training updates."""

    def prepare(self, key: jax.Array, images: Any, labels: Any) -> Batch:
        """Turns integer images and int32 labels into the loss's inputs; draws all of the batch's noise."""

    def loss(self, variables: Variables, batch: Batch, frozen: Any) -> tuple[jax.Array, tuple[Metrics, Any]]:
        """Returns (loss, (metrics, outputs)) of a microbatch: metrics are means over it, outputs are arrays [B, …]."""

    def finish(self, variables: Variables, metrics: Metrics, outputs: Any) -> tuple[Variables, Metrics]:
        """Updates what gradients do not, from the whole batch's metrics and outputs; by default nothing."""
        return variables, metrics

    def test_loss(self, runner: BatchRunner, variables: Variables, source: Any, frozen: Any) -> float:
        """Returns the loss of a split, with fixed noise."""


@dataclasses.dataclass(frozen=True)
class _LikelihoodTask(Task):
    """Maximum likelihood of what `prepare` returns; `frozen` is unused."""

    model: TarFlowConfig
    _: dataclasses.KW_ONLY
    block_penalty: float = 0.0  # see `training_loss`

    @property
    def dtype(self) -> jnp.dtype:
        return self.model.compute_dtype

    def init(self, key: jax.Array) -> Variables:
        conditioning = Conditioning(noise_std=jnp.ones(1))
        variables = TarFlow(self.model).init(key, jnp.zeros((1, *self.model.data_shape)), conditioning)
        return {name: variables[name] for name in ("params", "prior", "constants") if name in variables}

    def loss(self, variables: Variables, batch: Batch, frozen: None) -> tuple[jax.Array, tuple[Metrics, Any]]:
        flow = TarFlow(self.model, training_kernels(self.model))
        data, conditioning, levels = batch
        return training_loss(flow, variables, data, conditioning, levels=levels, block_penalty=self.block_penalty)


@dataclasses.dataclass(frozen=True)
class FlowTask(_LikelihoodTask):
    """Maximum likelihood of noisy images or latents (sections 3.1 and 3.2 of the paper)."""

    noise: Noise
    drop_label: float = 0.0  # probability of dropping an image's label and condition

    def __post_init__(self) -> None:
        if self.model.noise_conditional != (self.noise.kind == "levels"):
            raise UserError(
                f"model.noise_conditional is {self.model.noise_conditional} with noise.kind {self.noise.kind!r}; "
                "expected True with 'levels', False otherwise"
            )

    def prepare(self, key: jax.Array, images: Any, labels: jax.Array) -> Batch:
        noise_key, drop_key = jax.random.split(key)
        condition = None
        if isinstance(images, Latents):
            mean, std, condition = images
            images = mean + std * jax.random.normal(jax.random.fold_in(noise_key, 2), mean.shape, jnp.float32)
        levels = self.noise.levels(jax.random.fold_in(noise_key, 1), len(images))
        noise_std = None if levels is None else levels.std
        conditioning = _dropped(drop_key, self.drop_label, len(images), Conditioning(labels, noise_std, condition))
        return self.noise(noise_key, images, noise_std), conditioning, levels

    def finish(self, variables: Variables, metrics: Metrics, outputs: Any) -> tuple[Variables, Metrics]:
        if self.model.volume_preserving:
            prior = {"variance": updated_prior(variables["prior"]["variance"], outputs)}
            variables = {**variables, "prior": prior}
        if self.noise.kind == "levels":  # NaN for a quarter without images
            metrics = dict(metrics)
            metrics["level_losses"] = metrics.pop("quarter_losses") / metrics.pop("quarter_shares")
        return variables, metrics

    def test_loss(self, runner: BatchRunner, variables: Variables, source: ImageSource, frozen: None) -> float:
        """Returns the training loss, labels kept: nats per dimension less ½ log 2π. Image i has noise level i mod 8."""
        levels = self.noise.quantiles(_TEST_LEVELS) if self.noise.kind == "levels" else None
        key, num_dims = jax.random.key(0), self.model.num_dims
        log_probs = dataset_log_prob(runner, self.model, unit_prior(variables), source, self.noise, key, levels)
        if levels is None:
            return loss_of(log_probs, num_dims)
        return float(np.mean(levels * [loss_of(log_probs[i::_TEST_LEVELS], num_dims) for i in range(_TEST_LEVELS)]))


def updated_prior(variance: jax.Array, block_output: jax.Array) -> jax.Array:
    """Updates the running mean of z² [T, D] with the last block's output [B, T, D] (VP mode)."""
    return variance + PRIOR_RATE * (jnp.square(block_output).mean(0) - variance)


@dataclasses.dataclass(frozen=True)
class ArrayTask(_LikelihoodTask):
    """Maximum likelihood of sequences: batches are `Arrays`, splits `SequenceSource`s."""

    drop_condition: float = 0.0  # probability of dropping a sequence's label and condition

    def prepare(self, key: jax.Array, images: Arrays, labels: jax.Array | None) -> Batch:
        x, condition, lengths = images
        conditioning = Conditioning(labels, condition=condition, lengths=lengths)
        return x, _dropped(key, self.drop_condition, len(x), conditioning), None

    def test_loss(
        self, runner: BatchRunner, variables: Variables, source: SequenceSource, frozen: None = None
    ) -> float:
        """Returns the mean of -log p(x | label, condition), in nats."""
        return -float(sequence_log_prob(runner, self.model, variables, source).mean(dtype=np.float64))


@dataclasses.dataclass(frozen=True)
class StudentTask(Task):
    """Distillation of a flow's inverse from trajectories of real images; `frozen` has the flow.

    Noise has the level at which samples are drawn. Half of the labelled images get a guidance weight, uniform up to
    `max_guidance`, and the latents that guided sampling maps to them.
    """

    student: StudentConfig
    noise: Noise
    drop_label: float = 0.0  # as in `FlowTask`

    @property
    def dtype(self) -> jnp.dtype:
        return self.student.shape.compute_dtype

    def init(self, key: jax.Array) -> Variables:
        return {"params": Student(self.student).init(key, jnp.zeros((1, *self.student.flow.image_shape)))["params"]}

    def prepare(self, key: jax.Array, images: jax.Array, labels: jax.Array) -> Batch:
        noise_key, drop_key = jax.random.split(key)
        levels = self._levels(len(images))
        conditioning = _dropped(drop_key, self.drop_label, len(images), Conditioning(labels, levels))
        weight_key, guide_key = jax.random.split(jax.random.fold_in(noise_key, 1))
        weights = self.student.max_guidance * jax.random.uniform(weight_key, labels.shape)
        assert conditioning.labels is not None
        guided = (conditioning.labels >= 0) & jax.random.bernoulli(guide_key, 0.5, labels.shape)
        noisy = self.noise(noise_key, images, levels)
        return to_float(images), noisy, conditioning, jnp.where(guided, weights, 0.0)

    def loss(self, variables: Variables, batch: Batch, frozen: Frozen) -> tuple[jax.Array, tuple[Metrics, Any]]:
        flow = device_flow(self.student.flow)
        student = Student(self.student, training_kernels(self.student.flow))
        clean, noisy, conditioning, weights = batch
        guided = weights if self.student.max_guidance else None
        path = guided_trajectory(flow, frozen.flow, noisy, conditioning, guided)
        labels, perception = conditioning.labels, frozen.perception
        loss, metrics = distillation_loss(student, variables, clean, *path, labels, weights, perception)
        return loss, (metrics, None)

    def test_loss(self, runner: BatchRunner, variables: Variables, source: ImageSource, frozen: Frozen) -> float:
        """Returns the mean squared error of the student's clean images, without guidance."""

        def read(index: np.ndarray) -> dict[str, Any]:
            images, labels = source.read(index)
            return {"images": images, "labels": labels, "index": index.astype(np.int32)}

        errors = runner.run(
            functools.partial(_image_errors, self),
            (frozen.flow, variables),
            LazyBatch(read, len(source)),
            bytes_per_image=2 * forward_bytes(self.student.flow),
            description="student's errors",
            key=jax.random.key(0),
        )
        return float(errors.mean(dtype=np.float64))

    def _levels(self, count: int) -> jax.Array | None:
        return jnp.full(count, self.noise.std_max) if self.noise.kind == "levels" else None


@functools.partial(jax.jit, static_argnums=0)
def _image_errors(
    task: StudentTask, variables: Any, images: jax.Array, labels: jax.Array, index: jax.Array, key: jax.Array
) -> jax.Array:
    """Returns the mean squared error of each image, [B]; noise as in `Noise.of_numbered`."""
    levels = task._levels(len(images))
    noisy = task.noise.of_numbered(key, images, index, levels)
    latents, _ = guided_trajectory(device_flow(task.student.flow), variables[0], noisy, Conditioning(labels, levels))
    student = Student(task.student, device_flow(task.student.shape).kernels)
    clean, _ = student.apply(variables[1], latents, labels, None)
    return jnp.square(clean - to_float(images)).mean((1, 2, 3))


@dataclasses.dataclass(frozen=True)
class Reconstruction(Options):
    """The loss of an autoencoder: mean absolute error, a perceptual distance, and the KL divergence of the latents."""

    group: ClassVar[str] = "reconstruction"

    perceptual: float = option(1.0, "Weight of the perceptual distance; 0 for none.")
    perceptual_steps: int = option(1000, "Training steps, of 64 images, of the perceptual distance's network.", low=1)
    kl_weight: float = option(1e-6, "Weight of the latents' mean KL divergence per dimension from N(0, 1).")


@dataclasses.dataclass(frozen=True)
class AutoencoderTask(Task):
    """Reconstruction of images. Variables: `params/autoencoder/…`."""

    config: AutoencoderConfig
    reconstruction: Reconstruction
    decoder_only: bool = False

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.config.dtype)

    def init(self, key: jax.Array) -> Variables:
        side = 8 * self.config.factor
        params = AutoencoderKL(self.config).init(key, jnp.zeros((1, side, side, self.config.image_channels)))["params"]
        if self.decoder_only:
            params = {name: leaves for name, leaves in params.items() if name not in ENCODER}
        return {"params": {"autoencoder": params}}

    def prepare(self, key: jax.Array, images: jax.Array, labels: jax.Array) -> Batch:
        shape = (len(images), *(side // self.config.factor for side in images.shape[1:3]), self.config.latent_channels)
        noises = (jax.random.normal(one, shape, jnp.float32) for one in jax.random.split(key))
        return to_float(images), *noises

    def loss(self, variables: Variables, batch: Batch, frozen: Frozen) -> tuple[jax.Array, tuple[Metrics, Any]]:
        images, sampling_noise, flow_noise = batch
        params = (frozen.encoder or {}) | variables["params"]["autoencoder"]
        model, options = AutoencoderKL(self.config), self.reconstruction
        mean, log_variance = model.apply({"params": params}, images, method="encode")
        if self.decoder_only:
            mean, log_variance = jax.lax.stop_gradient((mean, log_variance))
        latents = mean + jnp.exp(log_variance / 2) * sampling_noise
        latents = latents + self.config.noise_std / self.config.scaling_factor * flow_noise
        decoded = model.apply({"params": params}, latents, method="decode")
        kl = 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance).mean()
        metrics = {"absolute_error": jnp.abs(decoded - images).mean(), "kl": kl, "latents_std": mean.std()}
        loss = metrics["absolute_error"] + options.kl_weight * kl
        if options.perceptual:
            num_classes = len(frozen.perception["Dense_0"]["bias"])
            metrics["perceptual"] = perceptual_distance(num_classes, frozen.perception, decoded, images).mean()
            loss = loss + options.perceptual * metrics["perceptual"]
        return loss, (metrics | {"loss": loss}, None)

    def test_loss(self, runner: BatchRunner, variables: Variables, source: ImageSource, frozen: Frozen) -> float:
        """Returns the mean squared error of images decoded from the means of their latents."""
        params = (frozen.encoder or {}) | variables["params"]["autoencoder"]
        rows = LazyBatch(lambda index: {"images": source.read(index)[0]}, len(source))
        size = 32 * math.prod(source.image_shape[:2]) * self.config.block_out_channels[0]
        errors = runner.run(functools.partial(_reconstruction_errors, self.config), params, rows, bytes_per_image=size)
        return float(errors.mean(dtype=np.float64))


@functools.partial(jax.jit, static_argnums=0)
def _reconstruction_errors(config: AutoencoderConfig, params: Any, images: jax.Array) -> jax.Array:
    """Returns the mean squared error of each image, [B]."""
    clean = to_float(images)
    return jnp.square(AutoencoderKL(config).apply({"params": params}, clean) - clean).mean((1, 2, 3))


def _dropped(key: jax.Array, probability: float, count: int, conditioning: Conditioning) -> Conditioning:
    """Replaces the label by -1 and the condition by NaN in some of `count` examples, drawn with this probability."""
    dropped = jax.random.bernoulli(key, probability, (count,))
    labels, condition = conditioning.labels, conditioning.condition
    if labels is not None:
        labels = jnp.where(dropped, -1, labels)
    if condition is not None:
        condition = jnp.where(dropped.reshape(-1, *(1,) * (condition.ndim - 1)), jnp.nan, condition)
    return conditioning.replace(labels=labels, condition=condition)
