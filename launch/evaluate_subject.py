"""What launch.evaluate measures: a model, and data to measure it on."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import flags
from etils import epath

from launch import common
from tarflow_jax.data import ImageSource, data_folder, open_source
from tarflow_jax.errors import UserError
from tarflow_jax.fingerprint import fingerprint
from tarflow_jax.pipeline import TarFlowPipeline
from tarflow_jax.runtime import make_mesh
from tarflow_jax.training import Recipe

UNKNOWN_LEVELS = "the noise levels of this model are not known; name one, --noise_std=σ"

WORKDIR = flags.DEFINE_string("workdir", None, "Measure the model of this training run's folder.")
MODEL = flags.DEFINE_string(
    "model", None, "Measure this saved model, by its folder or hub name, in place of --workdir."
)
DATA = flags.DEFINE_string("data", None, "Measure on this data set; on the one the run was trained on if not given.")
PREPROCESSING = flags.DEFINE_string("preprocessing", None, "Prepare --data this way: none, tarflow or adm.")
SEED = common.define_seed("Draw noise and samples from this seed.")
OUT = flags.DEFINE_string("out", None, "Write to this folder; if not given, to WORKDIR/evaluation or ./evaluation.")
NOISE_STD = flags.DEFINE_float(
    "noise_std", None, "Ask a model of many noise levels at this σ; if not given, the lowest, or best."
)
common.define_checkpoint_flag()


@dataclasses.dataclass(frozen=True)
class Subject:
    """The model, its data by split, and what to print about both."""

    pipe: TarFlowPipeline
    source: Callable[[str], ImageSource]
    data_dir: Path
    out: epath.Path
    protocol: dict[str, Any]


def open_subject() -> Subject:
    """What --workdir or --model, and --data, name.

    The pipeline runs on the devices of this process: processes share the samples, chunk by chunk.
    """
    if (WORKDIR.value is None) == (MODEL.value is None):
        raise UserError("expected one of --workdir and --model")
    workdir = None if WORKDIR.value is None else common.folder("workdir")
    name = workdir or common.folder("model")
    recipe = Recipe.from_workdir(workdir) if workdir else None
    if recipe is None and DATA.value is None:
        raise UserError("a saved model does not say what data it was trained on; name it, --data=NAME")
    pipe = common.open_pipeline(name, make_mesh(devices=jax.local_devices()))
    fields = recipe.config.data if recipe else None
    data = DATA.value or fields.source
    preprocessing = PREPROCESSING.value or (fields.preprocessing if fields else "none")
    data_dir = data_folder(fields.data_dir if fields else None)
    skip_bad = bool(fields and fields.skip_bad)

    def source(split: str) -> ImageSource:
        found = open_source(
            data,
            split,
            image_size=pipe.config.image_size,
            preprocessing=preprocessing,
            data_dir=data_dir,
            skip_bad=skip_bad,
        )
        if found.image_shape != pipe.config.image_shape:
            raise UserError(f"{data} has images {found.image_shape}, the model {pipe.config.image_shape}")
        return found

    protocol = {
        "model": str(name),
        "fingerprint": fingerprint(pipe.variables),
        "training_noise": "unknown" if pipe.noise is None else str(pipe.noise),
        "data_set": data,
        "preprocessing": preprocessing,
        "compute": pipe.config.dtype,
        "seed": SEED.value,
    }
    out = common.folder("out") if OUT.value else f"{workdir}/evaluation" if workdir else "evaluation"
    return Subject(pipe, source, data_dir, epath.Path(out), protocol)


def level_of(pipe: TarFlowPipeline) -> float | None:
    """The noise level that a flow of many is asked at; None for a flow of a single one."""
    if not pipe.config.noise_conditional or NOISE_STD.value is not None:
        return NOISE_STD.value
    if pipe.noise is None:
        raise UserError(UNKNOWN_LEVELS)
    return pipe.noise.std_min
