"""What a config says, checked and turned into the objects that training uses."""

import contextlib
import dataclasses
import json
import logging
import math
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from tarflow_jax.data import ImageSource, open_source
from tarflow_jax.errors import UserError, one_line
from tarflow_jax.files import write_text
from tarflow_jax.flow import TarFlowConfig
from tarflow_jax.noise import Noise
from tarflow_jax.runtime import make_mesh
from tarflow_jax.student import StudentConfig
from tarflow_jax.training.checkpoint import Checkpoints
from tarflow_jax.training.optimizer import Optimizer
from tarflow_jax.training.state import TrainConfig

logger = logging.getLogger(__name__)

CONFIG, DATA = "config.json", "data.json"

# What may differ between the runs that share a workdir: where it runs, where the data is kept (which is known by its
# fingerprint) and what is drawn and printed, never what it computes.
_FREE_FIELDS = (
    "data.cache_bytes",
    "data.data_dir",
    "data.num_workers",
    "data.skip_bad",
    "mesh",
    "sample",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.evaluate_every",
    "train.sample_every",
    "train.log_every",
    "train.profile_steps",
)
# What configs of earlier releases mean that lack these fields.
_NEW_FIELDS = {
    "model.rotary": False,
    "model.input_limit": 0.0,
    "model.image_limit": 0.0,
    "model.triangular": False,
    "model.noise_conditional": False,
    "noise.std_min": 0.0,
    "noise.std_max": 0.0,
    "noise.draw": "uniform",
    "noise.weight": "std",
    "optimizer.name": "adamw",
    "optimizer.muon_learning_rate": 0.0,
    "data.missing_labels": False,
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A training run's config and what follows from it.

    One with a group `student` trains that, by the flow that its model and noise tell of.

    Raises:
      ValueError: one line naming the field that is unknown, missing, or cannot be.
    """

    config: ml_collections.ConfigDict

    def __post_init__(self) -> None:
        if "model" not in self.config:
            raise UserError("this recipe has no model: it is a student's, for launch.distill")
        train = self.config.train
        for name in ("num_steps", "batch_size", "checkpoint_every", "log_every", "accumulation", "keep_checkpoints"):
            if train[name] < 1:
                raise UserError(f"train.{name} is {train[name]}; expected a positive number")
        others = {f"data.{name}": self.config.data[name] for name in ("num_workers", "cache_bytes")}
        others |= {f"train.{name}": train[name] for name in ("seed", "evaluate_every", "sample_every")}
        for name, value in others.items():
            if value < 0:
                raise UserError(f"{name} is {value}; expected a number from 0")
        multiplier = self.config.sample.denoise_multiplier
        if not math.isfinite(multiplier):
            raise UserError(f"sample.denoise_multiplier is {multiplier}; expected a finite number")
        if train.batch_size % train.accumulation:
            raise UserError(
                f"train.batch_size {train.batch_size} is not divisible by train.accumulation {train.accumulation}"
            )
        if not 0 <= train.drop_label <= 1:
            raise UserError(f"train.drop_label is {train.drop_label}; expected a probability")
        _ = self.train_config  # its parts check themselves

    @property
    def model(self) -> TarFlowConfig:
        return TarFlowConfig.from_dict(json.loads(self.config.model.to_json()))

    @property
    def noise(self) -> Noise:
        return Noise.from_dict(self.config.noise.to_dict())

    @property
    def train_config(self) -> TrainConfig:
        """What determines the state and the step."""
        fields = self.config.train
        optimizer = Optimizer(num_steps=fields.num_steps, **self.config.optimizer)
        return TrainConfig(self.model, self.noise, optimizer, fields.drop_label, fields.accumulation, self.student)

    @property
    def student(self) -> StudentConfig | None:
        """What a recipe of a student trains; None for a flow's."""
        if "student" not in self.config:
            return None
        fields = self.config.student.to_dict()
        del fields["flow"]  # its fingerprint
        return StudentConfig.of_flow(self.model, **fields)

    def mesh(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """The config's mesh over `devices`; None is all that there are.

        Raises:
          ValueError: it does not cover them, or the batch cannot be sharded over it.
        """
        mesh = make_mesh(**self.config.mesh, devices=devices)
        shards = mesh.shape["data"] * mesh.shape["fsdp"] * self.config.train.accumulation
        if self.config.train.batch_size % shards:
            raise UserError(
                f"train.batch_size {self.config.train.batch_size} does not divide by data x fsdp x accumulation "
                f"= {shards}; choose a multiple of it"
            )
        return mesh

    def source(self, split: str) -> ImageSource:
        """The data's "train" or "test" split, of the model's image shape.

        Raises:
          ValueError: another image shape than the model's, or labels that the model has no classes for.
        """
        fields, model = self.config.data, self.model
        source = open_source(
            fields.source,
            split,
            data_dir=fields.data_dir or None,
            image_size=model.image_size,
            preprocessing=fields.preprocessing,
            skip_bad=fields.skip_bad,
            cache_bytes=fields.cache_bytes,
        )
        if tuple(source.image_shape) != model.image_shape:
            raise UserError(
                f"{source.name} has images {tuple(source.image_shape)}, the model {model.image_shape}; "
                "set model.image_size and model.image_channels to match"
            )
        if model.num_classes and source.num_classes > model.num_classes:
            raise UserError(
                f"{source.name} has {source.num_classes} classes, the model {model.num_classes}; set model.num_classes"
            )
        if source.num_classes < model.num_classes and not fields.get("missing_labels", False):
            raise UserError(
                f"{source.name} has {source.num_classes or 'no'} classes, the model {model.num_classes}: some would "
                "never see an image; set model.num_classes, or data.missing_labels if that is meant"
            )
        return source

    def write_to(self, workdir: epath.PathLike, source: ImageSource | None = None) -> None:
        """Writes workdir/config.json, and data.json of what it is trained on, unless others are there.

        A run may be given more steps before its end, where the steps that it has taken would have had the same learning
        rates.

        Args:
          source: the training split; None is not looked at.

        Raises:
          ValueError: the workdir holds another configuration (names the fields), or a run on other data.
        """
        workdir = epath.Path(workdir)
        if (workdir / CONFIG).exists():
            stored = _NEW_FIELDS | flatten_dict(_read_json(workdir / CONFIG), sep=".")
            ours = flatten_dict(json.loads(self.to_json()), sep=".")
            differing = [
                f"{name} ({stored.get(name)!r} there, {ours.get(name)!r} here)"
                for name in sorted(stored.keys() | ours.keys())
                if stored.get(name) != ours.get(name) and not name.startswith(_FREE_FIELDS)
            ]
            if len(differing) == 1 and differing[0].startswith("train.num_steps "):
                self._check_growth(workdir, stored["train.num_steps"])
            elif differing:
                raise UserError(
                    f"{workdir} holds another configuration: {', '.join(differing)}; choose another workdir"
                )
        data = source and {"fingerprint": source.fingerprint, "label_names": source.label_names}
        if data and (workdir / DATA).exists() and _read_json(workdir / DATA).get("fingerprint") != data["fingerprint"]:
            raise UserError(
                f"{self.config.data.source} is not what {workdir} was trained on: images, labels or their order have "
                "changed since; bring them back, or choose another workdir"
            )
        if jax.process_index() == 0:
            write_text(workdir / CONFIG, self.to_json())
            if data:
                write_text(workdir / DATA, json.dumps(data) + "\n")

    def _check_growth(self, workdir: epath.Path, planned: int) -> None:
        """Raises UserError where a run of `planned` steps cannot become this one."""
        grown = self.train_config.optimizer
        with contextlib.closing(Checkpoints(workdir / "checkpoints")) as checkpoints:
            step = checkpoints.latest_step()
        plans = [dataclasses.replace(grown, num_steps=num_steps) for num_steps in (planned, grown.num_steps)]
        same = all(
            np.array_equal(*(jax.vmap(plan.schedule(peak))(np.arange(step, dtype=np.float32)) for plan in plans))
            for peak in (grown.learning_rate, grown.muon_learning_rate)
        )
        if not (same and step < planned < grown.num_steps):
            raise UserError(
                f"{workdir} holds a run of {planned} steps, {step} taken, and cannot become one of {grown.num_steps}: "
                "the learning rate follows from train.num_steps; choose another workdir"
            )
        logger.info(
            "train.num_steps grows from %d to %d; the %d steps taken are its first", planned, grown.num_steps, step
        )

    def to_json(self) -> str:
        return self.config.to_json(indent=2) + "\n"

    @classmethod
    def from_workdir(cls, workdir: epath.PathLike) -> "Recipe":
        """The recipe that a workdir was trained by: its config.json, or if that is lost the last checkpoint's.

        Raises:
          FileNotFoundError: neither is there.
          ValueError: it is no training config.
        """
        path, folder = epath.Path(workdir) / CONFIG, epath.Path(workdir) / "checkpoints"
        stored = None
        if path.exists():
            stored = _read_json(path)
        elif folder.exists():
            with contextlib.closing(Checkpoints(folder)) as checkpoints:
                stored = checkpoints.config()
        if stored is None:
            raise FileNotFoundError(f"{path} not found; expected the workdir of a training run")
        try:
            return cls(ml_collections.ConfigDict(stored))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path} is not a training config: {error}") from error


def label_names(workdir: epath.PathLike) -> list[str]:
    """The names of the classes that a run was trained on; [] where they are not known."""
    path = epath.Path(workdir) / DATA
    names = _read_json(path).get("label_names") if path.exists() else None
    return [str(name) for name in names] if isinstance(names, list) else []


def _read_json(path: epath.Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {one_line(error)}") from error
    if not isinstance(fields, dict):
        raise UserError(f"{path} is not what a training run wrote: it is no JSON object")
    if "format" in fields:
        raise UserError(
            f"{path.parent} is a saved model, no training run's folder; launch.evaluate takes it as --model"
        )
    return fields
