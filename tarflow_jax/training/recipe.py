"""Recipes: checks a training run's config and builds the objects that training uses."""

import dataclasses
import json
import textwrap
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import jax
import ml_collections
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from tarflow_jax.autoencoder import AutoencoderConfig
from tarflow_jax.data import ImageSource, SequenceSource, open_arrays, open_source
from tarflow_jax.data.sequences import KIND
from tarflow_jax.errors import UserError, one_line
from tarflow_jax.files import write_text
from tarflow_jax.flow import TarFlowConfig
from tarflow_jax.noise import Noise
from tarflow_jax.options import Options, described, option, required
from tarflow_jax.runtime import make_mesh
from tarflow_jax.sampling import Guidance
from tarflow_jax.student import StudentConfig
from tarflow_jax.training.optimizer import Optimizer
from tarflow_jax.training.step import TrainConfig
from tarflow_jax.training.task import ArrayTask, AutoencoderTask, FlowTask, Reconstruction, StudentTask, Task

CONFIG, DATA = "config.json", "data.json"

# Fields that do not affect results: where a run trains, where its data is, and what it saves, draws and prints.
CHANGEABLE_ON_RESUME = (
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


@dataclasses.dataclass(frozen=True)
class DataOptions(Options):
    """The training data."""

    group: ClassVar[str] = "data"

    source: str = option(
        "", "Data set: digits, fashion_mnist, emoji64, tfds:NAME, folder:, packed:, npz:, latents:, array:PATH."
    )
    data_dir: str = option("", "Folder of prepared data sets; empty for the default.")
    preprocessing: str = option("none", "How images are resized and cropped: none, tarflow or adm.")
    flip: bool = option(False, "Mirrors images left to right at random.")
    num_workers: int = option(0, "Threads that read ahead.")
    skip_bad: bool = option(False, "Skips a folder's damaged images instead of rejecting the folder.")
    cache_bytes: int = option(0, "Bytes of memory in which to cache decoded images.")


@dataclasses.dataclass(frozen=True)
class TrainOptions(Options):
    """The training loop."""

    group: ClassVar[str] = "train"

    num_steps: int = required("Optimizer steps.", low=1)
    batch_size: int = required("Images per step, over all devices.", low=1)
    accumulation: int = option(1, "Microbatches per step.", low=1)
    drop_label: float = option(0.0, "Probability of dropping an image's label and condition.")
    block_penalty: float = option(0.0, "Weight in the loss of the mean square of every block's input.")
    seed: int = option(0, "Seed of the weights, the noise and the data order.")
    checkpoint_every: int = option(1000, "Steps between checkpoints.", low=1)
    keep_checkpoints: int = option(3, "Newest checkpoints to keep, besides the best one.", low=1)
    evaluate_every: int = option(0, "Steps between test losses, which pick the best checkpoint; 0 for none.")
    sample_every: int = option(0, "Steps between previews; 0 for none.")
    log_every: int = option(50, "Steps between logged metrics.", low=1)
    profile_steps: tuple[int, int] = option((0, 0), "First and last step of a jax.profiler trace; 0, 0 for none.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % self.accumulation:
            raise UserError(
                f"train.batch_size {self.batch_size} is not divisible by train.accumulation {self.accumulation}"
            )
        if self.drop_label > 1:
            raise UserError(f"train.drop_label is {self.drop_label}; expected a number from 0 to 1")
        first, last = self.profile_steps
        if first > last or (last and not first):
            raise UserError(f"train.profile_steps is {self.profile_steps}; expected (first, last), or (0, 0) for none")


@dataclasses.dataclass(frozen=True)
class SampleOptions(Options):
    """Sampling, for a run's previews and figures."""

    group: ClassVar[str] = "sample"

    guidance: Guidance = Guidance()  # noqa: RUF009 (immutable)
    denoise_multiplier: float = option(1.0, "Factor on the score that denoises samples.")


@dataclasses.dataclass(frozen=True)
class MeshOptions(Options):
    """The device mesh."""

    group: ClassVar[str] = "mesh"

    data: int = option(-1, "Devices that shard the batch; -1 for all remaining ones, on a CPU its cores.", low=-1)
    fsdp: int = option(1, "Devices that shard the batch and the parameters.", low=-1)
    tensor: int = option(1, "Devices that shard attention heads and hidden units.", low=-1)


GROUPS: dict[str, Any] = {
    cls.group: cls for cls in (TarFlowConfig, DataOptions, Noise, Optimizer, TrainOptions, SampleOptions, MeshOptions)
}
_OF_IMAGES = ("noise.kind", "noise.std", "data.preprocessing", "data.flip", "model.noise_conditional")
# A student's model, data and noise are its flow's.
STUDENT_GROUPS = {"student": StudentConfig, **{name: GROUPS[name] for name in ("optimizer", "train", "sample", "mesh")}}
AUTOENCODER_GROUPS = {cls.group: cls for cls in (AutoencoderConfig, Reconstruction)}
AUTOENCODER_GROUPS |= {name: GROUPS[name] for name in ("data", "optimizer", "train", "mesh")}


def default_config(groups: dict[str, Any] = GROUPS) -> ml_collections.ConfigDict:
    """Returns a recipe with the default of every option in `groups`."""
    defaults = {f"{group}.{name}": default for group, cls in groups.items() for name, default, _ in described(cls)}
    return ml_collections.ConfigDict(unflatten_dict(defaults, sep="."))


def config_help(groups: dict[str, Any] = GROUPS) -> str:
    """Returns a line for each option of a recipe: its name, description and default."""
    lines = ["Options of a recipe, each a flag --config.GROUP.NAME=VALUE:"]
    for group, cls in groups.items():
        for name, default, text in described(cls):
            line = f"  {f'{group}.{name}':<38} {text} [{default}]"
            lines.append(textwrap.fill(line, 118, subsequent_indent=" " * 41))
    return "\n".join(lines)


class Recipe:
    """A training run's config and what follows from it.

    Attributes:
      config: as given. With a group `student`, a student of the flow in `model` and `noise` is trained. For arrays
        without `model.sequence_shape`, the model's fields that follow from the data are filled in.
      student: the student to train; None if the flow itself is trained.
      autoencoder: the autoencoder to train; if set, there is neither model nor noise.
      task: what is trained.
      train_config: what determines the state and the step.
    """

    def __init__(self, config: ml_collections.ConfigDict) -> None:
        """Raises UserError, which names the field that is unknown, missing or invalid."""
        groups = config.to_dict()
        for name in ("data", "sample", "mesh"):
            GROUPS[name].from_dict(groups.get(name, {}))
        train = TrainOptions.from_dict(groups["train"])
        optimizer = Optimizer.from_dict({**groups["optimizer"], "num_steps": train.num_steps})
        self.model: TarFlowConfig
        self.noise: Noise | None = None
        self.student: StudentConfig | None = None
        self.autoencoder: AutoencoderConfig | None = None
        self.task: Task
        if "autoencoder" in config:
            self.config, self.autoencoder = config, AutoencoderConfig.from_dict(groups["autoencoder"])
            reconstruction = Reconstruction.from_dict(groups["reconstruction"])
            self.task = AutoencoderTask(self.autoencoder, reconstruction, bool(config.get("decoder_of", "")))
        elif "model" in config:
            self.config = _with_shape(config)
            self.model = TarFlowConfig.from_dict(self.config.model.to_dict())
            if self.model.is_sequence:
                _check_of_sequences(config)
                self.task = ArrayTask(self.model, train.drop_label, block_penalty=train.block_penalty)
            else:
                self.noise = Noise.from_dict(groups["noise"])
                self.task = FlowTask(self.model, self.noise, train.drop_label, block_penalty=train.block_penalty)
                if "student" in config:  # its `flow` is a fingerprint
                    self.student = StudentConfig.from_dict({**groups["student"], "flow": self.model})
                    self.task = StudentTask(self.student, self.noise, train.drop_label)
        else:
            raise UserError("this recipe has no model: it is a student's, for launch.distill")
        self.train_config = TrainConfig(self.task, optimizer, train.accumulation)

    def mesh(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """Returns the config's mesh over `devices`, by default all; raises UserError unless it divides the batch."""
        mesh, fields = make_mesh(**self.config.mesh, devices=devices), self.config.train
        shards = mesh.shape["data"] * mesh.shape["fsdp"] * fields.accumulation
        if fields.batch_size % shards:
            raise UserError(
                f"train.batch_size {fields.batch_size} does not divide by data x fsdp x accumulation "
                f"= {shards}; choose a multiple of it"
            )
        return mesh

    def source(self, split: str) -> ImageSource | SequenceSource:
        """Opens the "train" or "test" split of the data; raises UserError unless it fits the model."""
        fields, autoencoder = self.config.data, self.autoencoder
        if not autoencoder and self.model.is_sequence:
            return open_arrays(fields.source, split, self.model)
        source = open_source(
            fields.source,
            split,
            data_dir=fields.data_dir or None,
            image_size=None if autoencoder else self.model.image_size,
            preprocessing=fields.preprocessing,
            skip_bad=fields.skip_bad,
            cache_bytes=fields.cache_bytes,
        )
        if autoencoder:
            channels, factor = autoencoder.image_channels, autoencoder.factor
            if source.bits != 8 or source.image_shape[2] != channels or any(n % factor for n in source.image_shape[:2]):
                raise UserError(
                    f"{source.name} has images {source.image_shape} of {source.bits} bits; this autoencoder is for "
                    f"8 bits, {channels} channels and sides that are multiples of {factor}"
                )
            return source
        model = self.model
        if source.bits == 0 and fields.flip:
            raise UserError("data.flip is for images; leave it False with latents")
        condition_shape = model.condition_shape if model.condition_dim else ()
        for text, there, here, options in (
            ("images {}", tuple(source.image_shape), model.image_shape, "image_size and image_channels"),
            ("conditions {}", source.condition_shape, condition_shape, "condition_length and condition_dim"),
            ("images of {} bits", source.bits, model.image_bits, "image_bits"),
            ("{} classes", source.num_classes, model.num_classes or source.num_classes, "num_classes"),
        ):
            if there != here:
                has = text.format(there)
                raise UserError(f"{source.name} has {has}, the model {here}; set model.{options} to {there}")
        return source

    def write_to(self, workdir: epath.PathLike, source: ImageSource | SequenceSource | None = None) -> None:
        """Writes workdir/config.json and, for a training split, data.json.

        Raises UserError if the workdir holds another configuration, or a run on other data.
        """
        workdir = epath.Path(workdir)
        stored = _stored_config(workdir)
        if stored and (differing := _differing(stored, json.loads(self.to_json()))):
            fields = ", ".join(f"{name} ({there!r} there, {here!r} here)" for name, (there, here) in differing.items())
            raise UserError(f"{workdir} holds another configuration: {fields}; choose another workdir")
        if source and not same_data(workdir, source):
            raise UserError(
                f"{self.config.data.source} is not what {workdir} was trained on: images, labels or their order have "
                "changed since; bring them back, or choose another workdir"
            )
        if jax.process_index() == 0:
            write_text(workdir / CONFIG, self.to_json())
            if source:
                data = {"fingerprint": source.fingerprint, "label_names": source.label_names}
                write_text(workdir / DATA, json.dumps(data) + "\n")

    def to_json(self) -> str:
        return self.config.to_json(indent=2) + "\n"

    @classmethod
    def from_workdir(cls, workdir: epath.PathLike) -> Self:
        """Reads the recipe of a run; raises FileNotFoundError if there is none, UserError if it is invalid."""
        path = epath.Path(workdir) / CONFIG
        stored = _stored_config(path.parent)
        if not stored:
            raise FileNotFoundError(f"{path} not found; expected the workdir of a training run")
        try:
            return cls(ml_collections.ConfigDict(stored))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path} is not a training config: {error}") from error


def _with_shape(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Fills in the model's fields that follow from arrays, unless they or `sequence_shape` are given."""
    sizes = config.model.get("sequence_shape"), config.model.get("image_size")
    if not config.data.source.startswith(KIND) or any(map(np.any, sizes)):
        return config
    config, defaults = config.copy_and_resolve_references(), default_config().model
    for name, value in open_arrays(config.data.source, "train").shape.items():
        if config.model.get(name) in (None, defaults[name]):
            config.model[name] = value
    return config


def _check_of_sequences(config: ml_collections.ConfigDict) -> None:
    if "student" in config:
        raise UserError("a student is for a flow of images; this one is of sequences")
    fields, defaults = (flatten_dict(c.to_dict(), sep=".") for c in (config, default_config()))
    for name in _OF_IMAGES:
        if fields.get(name, defaults[name]) != defaults[name]:
            raise UserError(f"{name} is {fields[name]!r}; expected {defaults[name]!r} for sequences")


def same_data(workdir: epath.PathLike, source: ImageSource | SequenceSource) -> bool:
    """Returns whether `source` holds the data that a run was trained on; True if the run has no record of it."""
    stored = read_json(epath.Path(workdir) / DATA)
    return stored.get("fingerprint", source.fingerprint) == source.fingerprint


def label_names(workdir: epath.PathLike) -> list[str]:
    """Returns the class names of a run's data; [] if unknown."""
    return read_json(epath.Path(workdir) / DATA).get("label_names", [])


def _stored_config(workdir: epath.Path) -> dict[str, Any]:
    """Returns the content of config.json; {} if there is none."""
    stored = read_json(workdir / CONFIG)
    if "format" in stored:
        raise UserError(
            f"{workdir} is a saved model; expected the workdir of a training run, or --model where a command has it"
        )
    return stored


def _differing(there: dict[str, Any], here: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns the fields that make two configs describe different runs, with both values.

    An option missing from a config that predates it has its default there; any other missing field is None.
    """
    defaults = json.loads(json.dumps(default_config(GROUPS | STUDENT_GROUPS | AUTOENCODER_GROUPS).to_dict()))
    there, here = (flatten_dict(defaults, sep=".") | flatten_dict(config, sep=".") for config in (there, here))
    return {
        name: values
        for name in sorted(there.keys() | here.keys())
        if (values := (there.get(name), here.get(name)))[0] != values[1] and not name.startswith(CHANGEABLE_ON_RESUME)
    }


def read_json(path: epath.Path) -> dict[str, Any]:
    """Reads a JSON object, {} if there is no such file; raises UserError if the file holds anything else."""
    if not path.exists():
        return {}
    try:
        fields = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {one_line(error)}") from error
    if not isinstance(fields, dict):
        raise UserError(f"{path} is not a JSON object")
    return fields
