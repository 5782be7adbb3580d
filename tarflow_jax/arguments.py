"""Checks of what users pass to a pipeline. All raise ValueError, one line: what was wrong, and what was expected.

Values of traced arguments are not known yet: only their shapes and dtypes are checked, and nothing is warned about.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from tarflow_jax.data.sequences import lengths_of
from tarflow_jax.errors import UserError
from tarflow_jax.flow import Conditioning, TarFlowConfig
from tarflow_jax.noise import Noise, to_float
from tarflow_jax.options import checked, shown
from tarflow_jax.runtime.batch_runner import is_traced
from tarflow_jax.runtime.parameters import variables_shapes
from tarflow_jax.sampling import (
    Decoder,
    GaussSeidelJacobi,
    Guidance,
    IterativeDenoising,
    Jacobi,
    Sequential,
    Student,
)
from tarflow_jax.student import StudentConfig

PIXEL_WARN_LIMIT = 4.0  # absolute value beyond which images seem not to be scaled to [-1, 1]
LEVEL_WARN_FACTOR = 1.25  # factor beyond the noise levels of training that draws a warning
logger = logging.getLogger("tarflow_jax.pipeline")

DecoderChoice = Decoder | Sequence[Decoder] | None


def check_conditioning(
    config: TarFlowConfig,
    batch_size: int,
    labels: Any,
    noise_std: Any = None,
    condition: Any = None,
    mask: Any = None,
    null_condition: Any = None,
    *,
    noise: Noise | None = None,
    required: bool = False,
) -> Conditioning:
    """Returns a call's keywords as a `Conditioning`; warns about noise levels far outside those of `noise`.

    With `required`, the condition may not be missing.
    """
    if condition is None and required:
        expected = (batch_size, *config.condition_shape)
        raise UserError(f"condition is missing; expected {expected}, since this flow was fitted without drop_condition")
    levels = check_levels(config, noise_std, batch_size)
    if noise is not None and noise.kind == "levels" and levels is not None and not is_traced(levels):
        low, high, values = noise.std_min, noise.std_max, np.asarray(levels)
        if ((values < low / LEVEL_WARN_FACTOR) | (values > high * LEVEL_WARN_FACTOR)).any():
            warn_once(f"noise_std is far outside the levels of this flow's training, {low:g} to {high:g}")
    if mask is not None and not config.is_sequence:
        raise UserError("a mask is for sequences; this model is of images")
    return Conditioning(
        check_labels(config, labels, batch_size),
        levels,
        None if condition is None else check_condition(config, condition, batch_size),
        None if mask is None else jnp.asarray(lengths_of(mask, batch_size, config.num_tokens)),
        None if null_condition is None else check_condition(config, null_condition, batch_size, "null_condition"),
    )


def condition_required(config: TarFlowConfig, variables: Any) -> bool:
    """Whether the flow has not learned to do without its condition: what replaces it is as initialised, zero."""
    if not config.condition_dim or config.has_prefix or is_traced(variables):
        return False
    blocks = variables["params"].values()
    return not any(np.any(np.asarray(block["null_condition"])) for block in blocks if "null_condition" in block)


def require_images(config: TarFlowConfig, method: str) -> None:
    """Raises ValueError for a flow of sequences."""
    if config.is_sequence:
        raise UserError(f"{method} is of images, and this model of sequences; use log_prob")


def check_pixels(config: TarFlowConfig, images: Any) -> Any:
    """Returns integer images [B, H, W, K] of the flow's bit depth."""
    require_images(config, "bits_per_dim")
    if not config.image_bits:
        raise UserError("bits_per_dim needs pixels; this is a flow of latents")
    images = images if is_traced(images) else np.asarray(images)
    if images.dtype != f"uint{config.image_bits}":
        raise UserError(f"images are {images.dtype}; expected uint{config.image_bits}")
    jax.eval_shape(lambda x: check_images(config, to_float(x)), images)
    return images


def check_denoising(
    config: TarFlowConfig,
    noise: Noise | None,
    noise_std: Any,
    multiplier: Any,
    method: IterativeDenoising | None,
    return_trajectory: bool,
) -> Any:
    """Returns the noise level, a number or array, that denoising removes; None is that of training."""
    method = checked("method", method, IterativeDenoising | None)
    if method is None:
        if return_trajectory:
            raise UserError("a trajectory is of a method's steps; give denoise a method, IterativeDenoising(…)")
        if noise is not None and noise.kind == "uniform":
            raise UserError(
                "denoising needs a model trained with gaussian noise, this one's was uniform; sample without denoising"
            )
        if config.noise_conditional:
            return noise_std
        std = noise.std if noise_std is None and noise is not None else noise_std
        if std is None:
            raise UserError(
                "denoising needs a model trained with gaussian noise, this one's was unknown; "
                "pass noise_std if you know it"
            )
        return check_number("noise_std", std, low=0)
    if is_traced(multiplier) or multiplier != 1:
        raise UserError(f"multiplier is {shown(multiplier)}; expected 1 with a method, whose steps have none")
    if not config.noise_conditional:
        raise UserError("iterative denoising needs a model of many noise levels; this one is of a single level")
    std_min = method.std_min or (noise and noise.std_min)
    if not std_min:
        raise UserError("the lowest noise level of this model is not known; give IterativeDenoising a std_min")
    if noise_std is None or np.ndim(noise_std):
        raise UserError(f"noise_std is {shown(noise_std)}; expected one number, the level that the steps begin at")
    if method.num_steps > 1 and not is_traced(noise_std) and np.float32(noise_std) < np.float32(std_min):
        raise UserError(f"noise_std is {noise_std:g}; expected at least std_min, {std_min:g}, where the steps end")
    return check_number("noise_std", noise_std, low=1e-6)


def check_sampling(
    config: TarFlowConfig, noise: Noise | None, decoder: Any, denoise: Any, multiplier: Any, return_log_prob: bool
) -> bool | IterativeDenoising:
    """Returns how `TarFlowPipeline.sample` denoises; by default it does so after Gaussian noise."""
    checked("denoise", denoise, bool | IterativeDenoising | None)
    noisy = noise is not None and noise.kind != "uniform"
    if return_log_prob and (isinstance(decoder, Student) or denoise or (denoise is None and noisy)):
        raise UserError("return_log_prob=True requires denoise=False and an exact decoder")
    if decoder == Student():
        if denoise not in (None, True) or multiplier != 1:
            raise UserError("Student() gives clean images by itself; leave denoise out, or polish")
        return False
    if denoise and not noisy:
        check_denoising(config, noise, None, 1.0, None, False)  # raises, with the reason
    return noisy if denoise is None else denoise


def check_guidance(config: TarFlowConfig, guidance: Guidance | None, without_null: bool) -> Guidance | None:
    """Returns None for weight 0. `without_null`: the flow did not learn to do without a condition, nor is one given."""
    guidance = checked("guidance", guidance, Guidance | None)
    guidance = guidance and guidance.checked_for(config)
    if guidance and without_null:
        raise UserError("guidance needs a flow fitted with drop_condition, or a null_condition")
    return guidance


def check_decoders(config: TarFlowConfig, decoder: DecoderChoice) -> tuple[Decoder, ...] | None:
    """Returns one decoder per block; None if all are sequential."""
    if decoder is None or decoder == Sequential():
        return None
    kinds = Sequential | Jacobi | GaussSeidelJacobi
    most = max(config.sequence_length - 1, 1)  # steps after which every token is exact
    for one in decoder if isinstance(decoder, Sequence) else (decoder,):
        if (number := getattr(one, "num_segments", getattr(one, "polish", 0))) > most:
            raise UserError(f"decoder is {one}; {number} is too many, expected at most {most} for this model")
    if isinstance(decoder, kinds | Student):
        return (decoder,) * config.num_blocks
    if isinstance(decoder, str) or not isinstance(decoder, Sequence):
        raise UserError(f"decoder is {shown(decoder)}; expected a decoder, as Jacobi(), or one for each block")
    if len(decoder) != config.num_blocks:
        raise UserError(f"{len(decoder)} decoders are given; expected one for each of {config.num_blocks} blocks")
    if wrong := [one for one in decoder if not isinstance(one, kinds)]:
        raise UserError(f"decoder has {wrong[0]!r}; expected Sequential(), Jacobi(…) or GaussSeidelJacobi(…)")
    return tuple(decoder)


def check_student_guidance(config: StudentConfig, guidance: Guidance | None) -> float | jax.Array:
    """Returns the weight, 0 for None; raises ValueError for guidance that the student did not learn."""
    if guidance is None:
        return 0.0
    if is_traced(guidance.attention_temperature) or dataclasses.replace(guidance, weight=0.0) != Guidance():
        raise UserError(f"guidance is {guidance}; a student takes a weight alone, Guidance(weight=w)")
    if not is_traced(guidance.weight) and not 0 <= guidance.weight <= config.max_guidance:
        raise UserError(
            f"guidance weight is {guidance.weight}; this student learned 0 to {config.max_guidance:g} "
            "(student.max_guidance)"
        )
    return guidance.weight


def check_variables(config: TarFlowConfig, variables: Any) -> dict[str, Any]:
    """Returns the variables; raises ValueError for the first one that is missing or of another shape."""
    tree = dict(checked("variables", variables, Mapping))
    shapes = {name: np.shape(leaf) for name, leaf in flatten_dict(tree, sep="/").items()}
    for name, shape in variables_shapes(config).items():
        if shapes.get(name) != shape:
            has = f"{name} of shape {shapes[name]}" if name in shapes else f"no {name}"
            raise UserError(f"variables have {has}; expected shape {shape} by this config")
    return tree


def check_number(name: str, value: Any, low: float = -math.inf) -> jax.Array:
    """Returns a float32 scalar; raises ValueError unless the value is one finite number, not below `low`."""
    if not isinstance(value, jax.core.Tracer) or value.ndim:
        value = checked(name, value, float, low=low)
    return jnp.asarray(value, jnp.float32)


def check_key(key: Any) -> jax.Array:
    """Returns the key; raises ValueError unless it is one key of `jax.random`."""
    try:
        jax.eval_shape(jax.random.bits, key)
    except (TypeError, ValueError):
        raise UserError(f"key is {shown(key)}; expected one key, jax.random.key(seed)") from None
    return key


def check_images(config: TarFlowConfig, images: Any, name: str = "images") -> jax.Array:
    """Returns float32 [B, H, W, K], [B, T, D] or [B, T]; raises ValueError for another shape, or for integers."""
    letters = ", ".join(("TD" if config.is_sequence else "HWK")[: len(config.data_shape)])
    try:
        array = jnp.asarray(images)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{name} are {shown(images)}; expected floats [B, {letters}]") from None
    if not jnp.issubdtype(array.dtype, jnp.floating):
        scale = f"{config.image_bits}-bit v is v / {(2**config.image_bits - 1) / 2} - 1"
        in_range = "" if config.is_sequence else f" in [-1, 1] ({scale})"
        raise UserError(f"{name} are {array.dtype}; expected floats{in_range}")
    if not array.ndim or array.shape[1:] != config.data_shape or not len(array):
        raise UserError(
            f"{name} have shape {array.shape}; expected [B, {letters}] = [B, "
            f"{', '.join(map(str, config.data_shape))}] with B >= 1"
        )
    return array.astype(jnp.float32)


def warn_about_pixels(images: jax.Array) -> None:
    """Warns, once per process, about images that seem not to be scaled to [-1, 1]."""
    if not is_traced(images):
        with jax.ensure_compile_time_eval():
            largest = float(jnp.maximum(images.max(), -images.min()))
        if largest > PIXEL_WARN_LIMIT:
            warn_once("images reach far outside [-1, 1]; 8-bit values v are v / 127.5 - 1")


@functools.cache
def warn_once(message: str) -> None:
    """Logs a warning once per process."""
    logger.warning(message)


def check_labels(config: TarFlowConfig, labels: Any, batch_size: int) -> jax.Array | None:
    """Returns int32 [B], or None without labels or classes; raises ValueError for labels that are not classes."""
    if labels is None:
        return None
    traced, classes = is_traced(labels), config.num_classes
    try:
        array = labels if traced else np.asarray(labels)
    except ValueError:
        raise UserError(f"labels are {shown(labels)}; expected whole numbers of shape ({batch_size},)") from None
    if not np.issubdtype(array.dtype, np.integer) or array.shape != (batch_size,):
        raise UserError(f"labels are {array.dtype} {array.shape}; expected whole numbers of shape ({batch_size},)")
    wrong = [] if traced else array[(array < -1) | (array >= classes)]
    if len(wrong):
        valid = f"-1 (no class) to {classes - 1}" if classes else "-1 or None, the model has no classes"
        raise UserError(f"label {wrong[0]} is out of range; expected {valid}")
    return jnp.asarray(array, jnp.int32) if classes else None


def check_condition(config: TarFlowConfig, condition: Any, batch_size: int, name: str = "condition") -> jax.Array:
    """Returns float32 [B, C], [B, T, C] or [B, L, C]; raises ValueError for another shape, or if it is not finite."""
    condition, expected = jnp.asarray(condition, jnp.float32), (batch_size, *config.condition_shape)
    if name == "null_condition" and condition.shape == expected[1:]:
        condition = jnp.broadcast_to(condition[None], expected)
    if not config.condition_dim or condition.shape != expected:
        wanted = f"expected {expected}" if config.condition_dim else "this model has no condition"
        raise UserError(f"{name} has shape {condition.shape}; {wanted}")
    if not is_traced(condition):
        with jax.ensure_compile_time_eval():  # on its device, also where other arguments are traced
            finite = jnp.isfinite(condition).reshape(batch_size, -1).all(1)
            if not finite.all():
                raise UserError(f"{name} is not finite in row {finite.argmin()}")
    return condition


def check_levels(config: TarFlowConfig, noise_std: Any, batch_size: int) -> jax.Array | None:
    """Returns noise levels σ as float32 [B], None for a flow of one level; raises ValueError for what does not fit.

    Args:
      noise_std: a number, or [B]; None if it is not given.
    """
    if not config.noise_conditional:
        if noise_std is not None:
            raise UserError(f"noise_std is {shown(noise_std)}, but this model is of one noise level; leave it out")
        return None
    if noise_std is None:
        raise UserError(
            "this model is of many noise levels; say at which, noise_std=σ (a number, or one for each image)"
        )
    try:
        levels = jnp.asarray(noise_std, jnp.float32)
    except (TypeError, ValueError):
        raise UserError(f"noise_std is {shown(noise_std)}; expected a number or ({batch_size},)") from None
    if levels.shape not in ((), (batch_size,)):
        raise UserError(f"noise_std has shape {levels.shape}; expected a number or ({batch_size},)")
    if not is_traced(levels) and not ((np.asarray(levels) > 0) & (np.asarray(levels) < math.inf)).all():
        raise UserError(f"noise_std is {shown(noise_std)}; expected positive numbers")
    return jnp.broadcast_to(levels, (batch_size,))
