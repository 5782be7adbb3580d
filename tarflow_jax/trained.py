"""A trained flow: its weights opened and saved, placed on devices, and run in batches."""

import contextlib
import dataclasses
import functools
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from tarflow_jax import interop
from tarflow_jax.arguments import check_images, check_labels, is_traced
from tarflow_jax.errors import UserError
from tarflow_jax.flow import TarFlowConfig
from tarflow_jax.noise import Noise
from tarflow_jax.runtime import BatchRunner
from tarflow_jax.runtime.batches import DEFAULT_MEMORY_BOUND
from tarflow_jax.sampling import Schedule
from tarflow_jax.sampling.memory import backward_bytes
from tarflow_jax.student import TrainedStudent
from tarflow_jax.training.workdir import read_student, read_workdir

logger = logging.getLogger(__name__)


class TrainedFlow:
    """Weights of a flow, and what is known of them; see `TarFlowPipeline` for what they are good for.

    Attributes:
      config: the model's shape.
      variables: the parameters in use (the averaged ones where an average was kept) and, in VP mode, the prior.
      noise: what it was trained with; None if unknown.
    """

    def __init__(
        self,
        config: TarFlowConfig,
        variables: Mapping[str, Any],
        noise: Noise | None = None,
        *,
        ema_params: Mapping[str, Any] | None = None,
        card: Mapping[str, Any] | None = None,
        schedule: Schedule | epath.PathLike | None = None,
        student: TrainedStudent | epath.PathLike | None = None,
        mesh: Mesh | None = None,
        memory_bound: int = DEFAULT_MEMORY_BOUND,
    ) -> None:
        """Wraps variables.

        Args:
          config: the model's shape.
          variables: of that shape.
          noise: of its training.
          ema_params: the parameters' average, used instead of the raw ones, which are kept to be saved beside it.
          card: what a saved model's card tells, see `interop.save_model`.
          schedule: what `decoder="auto"` uses, or the folder that holds it, where it is looked for at its first use.
          student: what `decoder="student"` uses, or the folder that holds it, where it is looked for at its first use.
          mesh: devices to spread over (`tarflow_jax.runtime.make_mesh`); None is the default device.
          memory_bound: bytes that a batch's activations may take, on all devices together.
        """
        self.config, self.noise = config, noise
        self.card: Mapping[str, Any] = card or {}
        self._schedule, self._student, self._raw_params = schedule, student, None
        if ema_params is not None:
            self._raw_params = variables["params"]
            variables = {**variables, "params": ema_params}
        self._runner = BatchRunner(mesh, memory_bound)
        self.variables = self._runner.place(dict(variables))
        # On a CPU computing activations again is faster than keeping them.
        keep_all = dataclasses.replace(config, remat="none")
        recompute = self._runner.on_cores or backward_bytes(keep_all) > memory_bound // 8
        self._denoiser = dataclasses.replace(config, remat="full" if recompute else "none")

    def __repr__(self) -> str:
        config, devices = self.config, {str(device) for device in jax.tree.leaves(self.variables)[0].devices()}
        shape = f"{'x'.join(map(str, config.image_shape))}, {config.patch_size}-{config.width}-{config.depths}"
        noise = "unknown" if self.noise is None else str(self.noise)
        number = sum(leaf.size for leaf in jax.tree.leaves(self.variables["params"]))
        return (
            f"{type(self).__name__}({shape}, {config.num_classes or 'no'} classes, noise {noise}, "
            f"{number:,} parameters on {', '.join(sorted(devices))})"
        )

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, whose weights are on the host until they are opened again."""
        if self._runner.mesh is not None:
            raise UserError("a pipeline on a mesh is not copied or pickled; save_pretrained, and open it again")
        host = jax.device_get((self.variables, self._raw_params))
        return {**self.__dict__, "variables": host[0], "_raw_params": host[1], "_runner": self._runner.memory_bound}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._runner = BatchRunner(None, state["_runner"])
        self.variables = self._runner.place(state["variables"])

    @property
    def noise_std(self) -> float | None:
        """σ of the Gaussian noise in what is drawn; None for a model trained otherwise.

        That of the training, or the highest of its levels.
        """
        if self.noise is None or self.noise.kind == "uniform":
            return None
        return self.noise.std_max if self.noise.kind == "levels" else self.noise.std

    @property
    def drawn_level(self) -> float | None:
        """`noise_std` for a flow that is conditional on it, as `decode` takes it; None for one of a single level."""
        return self.noise_std if self.config.noise_conditional else None

    @functools.cached_property
    def schedule(self) -> Schedule | None:
        """What `decoder="auto"` uses, None for sequential decoders; ValueError if it is of other weights than these."""
        found = self._schedule
        if found is not None and not isinstance(found, Schedule):
            found = Schedule.read(found, self.config.num_blocks)
        if found is not None:
            found.check_weights(self.variables)
        return found

    @functools.cached_property
    def student(self) -> TrainedStudent | None:
        """What `decoder="student"` uses; None where there is none; ValueError if it is of other weights than these."""
        found = self._student
        if found is not None and not isinstance(found, TrainedStudent):
            in_workdir = (epath.Path(found) / "checkpoints").is_dir()
            found = read_student(found, self._runner.mesh) if in_workdir else interop.load_student(found)
        if found is None:
            return None
        found.check_flow(self.config, self.variables)
        return dataclasses.replace(found, variables=self._runner.place(found.variables))

    @classmethod
    def from_pretrained(cls, name: epath.PathLike, *, best: bool = False, **options: Any) -> Self:
        """Opens a training workdir, a saved model's folder, or a model of the hub ("owner/name").

        Args:
          name: a workdir may be in an object store (gs://).
          best: of a workdir, the checkpoint of the lowest test loss instead of the last.
          options: `mesh` and `memory_bound`, see the constructor.

        Raises:
          FileNotFoundError: nothing of the kind there.
          ValueError: what is there is damaged or of another kind.
        """
        workdir = epath.Path(name)
        if (workdir / "checkpoints").is_dir():
            run = read_workdir(workdir, options.get("mesh"), best=best)
            return cls(
                run.config,
                run.variables,
                run.noise,
                ema_params=run.ema_params,
                card=run.card,
                schedule=workdir,
                student=workdir,
                **options,
            )
        if best:
            raise UserError(f"{name} is no training workdir; only these have a best checkpoint")
        saved = interop.load_model(name)
        beside = {"schedule": name, "student": name}
        return cls(saved.config, saved.variables, saved.noise, ema_params=saved.ema_params, **beside, **options)

    @classmethod
    def from_torch(
        cls,
        path: str | Path,
        image_size: int | tuple[int, int],
        image_channels: int,
        patch_size: int,
        noise_std: float | None = None,
        **options: Any,
    ) -> Self:
        """Reads a state dict of the PyTorch reference; see `interop.load_torch` for arguments and errors."""
        config, variables = interop.load_torch(path, image_size, image_channels, patch_size)
        return cls(config, variables, None if noise_std is None else Noise("gaussian", noise_std), **options)

    def to_torch(self, path: str | Path) -> None:
        """Writes a state dict that the PyTorch reference loads with strict=True; see `interop.save_torch`."""
        interop.save_torch(path, self.config, self.variables)

    def save_pretrained(
        self, folder: str | Path, *, dtype: str = "float32", card: Mapping[str, Any] | None = None
    ) -> None:
        """Writes config.json, model.safetensors and a model card; see `interop.save_model`.

        `card` is added to what is known of the run: its samples, and what launch.evaluate has measured of these
        weights. The average and the raw parameters are both kept. The measured figures, the decoder schedule and the
        student go with the weights that they are of: not with those that bfloat16 rounds.
        """
        variables, ema_params = self.variables, None
        if self._raw_params is not None:
            variables, ema_params = {**variables, "params": self._raw_params}, variables["params"]
        saved = interop.SavedModel(self.config, variables, self.noise, ema_params, {**self.card, **(card or {})})
        student = None
        try:
            student = self.student
        except UserError as error:
            logger.warning("the student is left out: %s", error)
        interop.save_model(folder, saved, dtype=dtype, student=student)
        with contextlib.suppress(UserError):  # an unusable schedule
            if dtype == "float32" and self.schedule:
                self.schedule.write(Path(folder))

    def push_to_hub(self, name: str, *, private: bool = False, token: str | None = None, **options: Any) -> str:
        """Saves the model to the Hugging Face hub as "owner/name", which is made if it is missing.

        Args:
          private: of a model that is made.
          token: None is the one that `hf auth login` or HF_TOKEN gave.
          options: `dtype` and `card`, see `save_pretrained`.

        Returns:
          The commit's address.

        Raises:
          ValueError: no such name, or the hub refused.
          ImportError: huggingface_hub is not installed.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **options | {"card": {"name": name, **(options.get("card") or {})}})
            return interop.push_model(folder, name, private=private, token=token)

    def _run(
        self,
        program: functools.partial,
        images: Any,
        labels: Any,
        of_image: Any,
        *args: Any,
        variables: Any = None,
        **options: Any,
    ) -> Any:
        """One of `programs` on images and labels that are checked first; options as of `BatchRunner.run`.

        `of_image` is what else each image has of its own, arrays [B, …] or None; `variables` None are the flow's.
        """
        variables = self.variables if variables is None else variables
        images, labels = check_images(self.config, images), check_labels(self.config, labels, len(images))
        if is_traced((images, labels, of_image, args)):
            return program(variables, images, labels, of_image, *args)
        name = program.func.__name__.strip("_")
        rows = (images, labels, of_image)
        results = self._runner.run(program, variables, rows, *args, description=name, **options)
        return jax.tree.map(jnp.asarray, results)
