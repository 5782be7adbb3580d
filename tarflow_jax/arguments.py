"""What callers hand to the pipeline, checked: arrays of the right shape, or one clear line."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tarflow_jax.errors import UserError
from tarflow_jax.flow import TarFlowConfig
from tarflow_jax.sampling import Decoder, GaussSeidelJacobi, Guidance, Jacobi, Schedule, Sequential
from tarflow_jax.student import StudentConfig, TrainedStudent

DecoderChoice = Decoder | Sequence[Decoder] | str | None


def is_traced(tree: Any) -> bool:
    """Whether any array of a pytree is one of `jax.jit`, `jax.grad` or `jax.vmap`, which has no values yet."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def check_number(name: str, value: Any, least: float = -math.inf) -> jax.Array:
    """float32 scalar; ValueError unless it is finite and not below `least`."""
    if not is_traced(value) and not (least <= value < math.inf and math.isfinite(value)):
        expected = "a finite number" if least == -math.inf else f"a finite number from {least:g}"
        raise UserError(f"{name} is {value}; expected {expected}")
    return jnp.asarray(value, jnp.float32)


def check_images(config: TarFlowConfig, images: Any) -> jax.Array:
    """float32 [B, H, W, K]; ValueError for another shape, or for whole numbers."""
    images = jnp.asarray(images)
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise UserError(f"images are {images.dtype}; expected floats in [-1, 1] (8-bit v is v / 127.5 - 1)")
    if images.ndim != 4 or images.shape[1:] != config.image_shape or not len(images):
        raise UserError(
            f"images have shape {images.shape}; expected [B, H, W, K] = [B, "
            f"{', '.join(map(str, config.image_shape))}] with B >= 1"
        )
    return images.astype(jnp.float32)


def check_labels(config: TarFlowConfig, labels: Any, batch_size: int) -> jax.Array | None:
    """int32 [B], None where none are given or the model has no classes; ValueError for what is no class."""
    if labels is None:
        return None
    traced, classes = is_traced(labels), config.num_classes
    array = labels if traced else np.asarray(labels)
    if not np.issubdtype(array.dtype, np.integer) or array.shape != (batch_size,):
        raise UserError(f"labels are {array.dtype} {array.shape}; expected whole numbers of shape ({batch_size},)")
    wrong = [] if traced else array[(array < -1) | (array >= classes)]
    if len(wrong):
        valid = f"-1 (no class) to {classes - 1}" if classes else "-1 or None, the model has no classes"
        raise UserError(f"label {wrong[0]} is out of range; expected {valid}")
    return jnp.asarray(array, jnp.int32) if classes else None


def check_levels(config: TarFlowConfig, noise_std: Any, batch_size: int) -> jax.Array | None:
    """Noise levels σ as float32 [B], None for a flow that is not conditional on them; ValueError for what does not fit.

    Args:
      noise_std: a number, or [B]; None where it is not given.
    """
    if not config.noise_conditional:
        if noise_std is not None:
            raise UserError(f"noise_std is {noise_std}, but this model is of one noise level; leave it out")
        return None
    if noise_std is None:
        raise UserError(
            "this model is of many noise levels; say at which, noise_std=σ (a number, or one for each image)"
        )
    levels = jnp.asarray(noise_std, jnp.float32)
    if levels.shape not in ((), (batch_size,)):
        raise UserError(f"noise_std has shape {levels.shape}; expected a number or ({batch_size},)")
    if not is_traced(levels) and not bool(((levels > 0) & (levels < math.inf)).all()):
        raise UserError(f"noise_std is {noise_std}; expected positive numbers")
    return jnp.broadcast_to(levels, (batch_size,))


def check_decoder(
    config: TarFlowConfig, schedule: Schedule | None, decoder: DecoderChoice, guidance: Guidance | None, batch_size: int
) -> tuple[Decoder, ...] | None:
    """One decoder a block, or None for sequential ones; ValueError for anything else.

    `guidance` as `check_guidance` returns it: "auto" holds only for the one that the schedule was tuned for.
    """
    if isinstance(decoder, str):
        if decoder != "auto":
            raise UserError(f'decoder is {decoder!r}; expected a decoder, one for each block, "auto" or "student"')
        if schedule is None:
            return None
        if schedule.guidance != guidance:
            raise UserError(
                f'decoder="auto" was tuned for {schedule.guidance or "no guidance"}, not for '
                f"{guidance or 'no guidance'}; run launch.tune_decoder with it, or name a decoder"
            )
        return schedule.of(batch_size)
    if decoder is None or decoder == Sequential():
        return None
    if isinstance(decoder, Sequential | Jacobi | GaussSeidelJacobi):
        return (decoder,) * config.num_blocks
    decoders = tuple(decoder)
    if len(decoders) != config.num_blocks:
        raise UserError(f"{len(decoders)} decoders are given; expected one for each of {config.num_blocks} blocks")
    if wrong := [one for one in decoders if not isinstance(one, Sequential | Jacobi | GaussSeidelJacobi)]:
        raise UserError(f"decoder has {wrong[0]!r}; expected Sequential(), Jacobi(…) or GaussSeidelJacobi(…)")
    return decoders


def check_guidance(config: TarFlowConfig, guidance: Guidance | None) -> Guidance | None:
    """None where it changes nothing, its weight being 0; ValueError for guidance that the model cannot give."""
    if guidance is not None and not isinstance(guidance, Guidance):
        raise UserError(f"guidance is {guidance!r}; expected Guidance(weight=…) or None")
    if guidance is None or guidance.weight == 0:
        return None
    if not config.num_classes and guidance.attention_temperature == 1:
        raise UserError(
            "guidance by class needs a class-conditional model, this one has no classes; "
            "set an attention temperature other than 1"
        )
    return guidance


def begins_at_student(decoders: Sequence[Decoder] | None) -> bool:
    """Whether any decoder begins at a student's trajectory."""
    return any(isinstance(one, Jacobi) and one.init == "student" for one in decoders or ())


def check_polish(polish: int, decoder: DecoderChoice) -> None:
    """ValueError unless `polish` is a number of updates that fits the decoder."""
    if not isinstance(polish, int) or polish < 0:
        raise UserError(f"polish is {polish!r}; expected a whole number from 0")
    if polish and decoder != "student":
        raise UserError(f'polish is {polish}, which is for decoder="student"; leave it out')


def check_student(student: TrainedStudent | None) -> TrainedStudent:
    """ValueError where there is none."""
    if student is None:
        raise UserError("this model has no student; train one with launch.distill, or name another decoder")
    return student


def check_student_guidance(config: StudentConfig, guidance: Guidance | None) -> float:
    """The weight; ValueError for guidance that a student did not learn. `guidance` as `check_guidance` returns it."""
    if guidance is None:
        return 0.0
    if dataclasses.replace(guidance, weight=0.0) != Guidance():
        raise UserError(f"guidance is {guidance}; a student takes a weight alone, Guidance(weight=w)")
    if not 0 <= guidance.weight <= config.max_guidance:
        raise UserError(
            f"guidance weight is {guidance.weight}; this student learned 0 to {config.max_guidance:g} "
            "(student.max_guidance)"
        )
    return guidance.weight
