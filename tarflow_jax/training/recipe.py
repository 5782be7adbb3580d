"""What a config says, checked and turned into the objects that training uses."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import optax
from etils import epath
from jax.sharding import Mesh

from tarflow_jax.data import ImageSource, open_source
from tarflow_jax.errors import UserError
from tarflow_jax.files import write_text
from tarflow_jax.flow import TarFlowConfig
from tarflow_jax.noise import Noise
from tarflow_jax.runtime import make_mesh
from tarflow_jax.training.checkpoint import Checkpoints

# What may differ between the runs that share a workdir: where it runs and what it prints, never what it computes.
_FREE_FIELDS = (
    "mesh",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.evaluate_every",
    "train.sample_every",
    "train.log_every",
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A training run's config and what follows from it.

    Raises:
      ValueError: one line naming the field that is unknown, missing, or cannot be.
    """

    config: ml_collections.ConfigDict

    def __post_init__(self) -> None:
        train = self.config.train
        for name in (
            "num_steps",
            "batch_size",
            "checkpoint_every",
            "log_every",
            "accumulation",
            "keep_checkpoints",
        ):
            if train[name] < 1:
                raise UserError(f"train.{name} is {train[name]}; expected a positive number")
        if train.batch_size % train.accumulation:
            raise UserError(
                f"train.batch_size {train.batch_size} is not divisible by train.accumulation {train.accumulation}"
            )
        if not 0 <= train.drop_label <= 1:
            raise UserError(f"train.drop_label is {train.drop_label}; expected a probability")
        if not 0 <= self.config.optimizer.ema_decay < 1:
            raise UserError(f"optimizer.ema_decay is {self.config.optimizer.ema_decay}; expected 0 (none) to < 1")
        # Both check themselves.
        _ = self.model, self.noise

    @property
    def model(self) -> TarFlowConfig:
        return TarFlowConfig.from_dict(json.loads(self.config.model.to_json()))

    @property
    def noise(self) -> Noise:
        return Noise(self.config.noise.kind, float(self.config.noise.std))

    def schedule(self) -> optax.Schedule:
        """Learning rate of a step: linear warm-up, then a cosine, from and to `final_learning_rate`."""
        fields = self.config.optimizer
        return optax.warmup_cosine_decay_schedule(
            init_value=fields.final_learning_rate,
            peak_value=fields.learning_rate,
            warmup_steps=fields.warmup_steps,
            decay_steps=max(self.config.train.num_steps, fields.warmup_steps + 1),
            end_value=fields.final_learning_rate,
        )

    def optimizer(self) -> optax.GradientTransformation:
        """AdamW with decay on every parameter, as the reference has it; clipping where `clip_norm` is not 0."""
        fields = self.config.optimizer
        adamw = optax.adamw(self.schedule(), b1=fields.beta1, b2=fields.beta2, weight_decay=fields.weight_decay)
        if not fields.clip_norm:
            return adamw
        return optax.chain(optax.clip_by_global_norm(fields.clip_norm), adamw)

    def mesh(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """The config's mesh over `devices`; None is all that there are.

        Raises:
          ValueError: it does not cover them, or the batch cannot be cut over it.
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
        return source

    def claim(self, workdir: epath.PathLike, *, write: bool = True) -> None:
        """Checks workdir/config.json if there is one, and writes it.

        Args:
          workdir: of the run.
          write: False on all processes but one.

        Raises:
          ValueError: the workdir holds another configuration; names the fields.
        """
        path = epath.Path(workdir) / "config.json"
        if path.exists():
            try:
                stored = _flatten(json.loads(path.read_text()))
            except (ValueError, AttributeError) as error:
                raise UserError(f"{path} is not a training config: {error}") from error
            ours = _flatten(json.loads(self.to_json()))
            differing = [
                f"{name} ({stored.get(name)!r} there, {ours.get(name)!r} here)"
                for name in sorted(stored.keys() | ours.keys())
                if stored.get(name) != ours.get(name) and not name.startswith(_FREE_FIELDS)
            ]
            if differing:
                raise UserError(
                    f"{workdir} holds another configuration: {', '.join(differing)}; choose another workdir"
                )
        if write:
            write_text(path, self.to_json())

    def to_json(self) -> str:
        return self.config.to_json(indent=2) + "\n"

    @classmethod
    def from_workdir(cls, workdir: epath.PathLike) -> "Recipe":
        """The recipe that a workdir was trained by: its config.json, or if that is lost the last checkpoint's.

        Raises:
          FileNotFoundError: neither is there. ValueError: it is no training config.
        """
        path, folder = epath.Path(workdir) / "config.json", epath.Path(workdir) / "checkpoints"
        stored = None
        if not path.exists() and folder.exists():
            checkpoints = Checkpoints(folder)
            stored = checkpoints.config()
            checkpoints.close()
        if not path.exists() and stored is None:
            raise FileNotFoundError(f"{path} not found; expected the workdir of a training run")
        try:
            return cls(ml_collections.ConfigDict(stored or json.loads(path.read_text())))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path} is not a training config: {error}") from error


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat
