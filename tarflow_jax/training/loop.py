"""The training loop: data, steps, checkpoints, metrics. The same command again continues a run."""

import itertools
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath
from jax.sharding import Mesh
from tqdm import tqdm

from tarflow_jax.data import Batch, ImageSource, SequenceSource, prefetch_to_device, train_batches
from tarflow_jax.files import sole_user
from tarflow_jax.runtime import (
    BatchRunner,
    LocalBatch,
    Preempted,
    PreemptionGuard,
    replicated,
    use_cores_as_devices,
)
from tarflow_jax.training.checkpoint import Checkpoints
from tarflow_jax.training.metrics import MetricsWriter
from tarflow_jax.training.recipe import Recipe
from tarflow_jax.training.step import TrainState, abstract_state, compiled_step, new_state
from tarflow_jax.training.task import Metrics
from tarflow_jax.training.workdir import write_start

logger = logging.getLogger(__name__)


class NonFiniteError(ArithmeticError):
    """The loss or gradient norm of a step is not finite; the run stops and keeps its last checkpoint."""


def train(
    config: ml_collections.ConfigDict,
    workdir: epath.PathLike,
    preview: Callable[[int, dict[str, Any]], None] | None = None,
    frozen: Any = None,
    initial: Mapping[str, Any] | None = None,
) -> TrainState:
    """Trains until `config.train.num_steps`, starting from the workdir's last checkpoint; returns the final state.

    Args:
      config: a recipe, see configs/defaults.py.
      workdir: a local folder that all processes see, or gs://; its files are listed in docs/formats.md.
      preview: called as preview(step, variables) every `train.sample_every` steps, on every process.
      frozen: arrays that the recipe's task reads but training does not change, a `Frozen`; replicated over the mesh
        unless they are on it.
      initial: variables to start from instead of random ones; ignored when a run continues.

    Raises:
      UserError: an invalid config, or a workdir that holds another config or is used by another process.
      NonFiniteError: a loss or gradient norm is not finite.
      Preempted: SIGTERM, SIGINT or SIGHUP was received; the state is saved.
      OSError: a checkpoint could not be written.
    """
    recipe, fields = Recipe(config), config.train
    if config.mesh.data == -1:
        use_cores_as_devices(fields.batch_size // fields.accumulation)
    source = recipe.source("train")
    if source.units:
        initial = {"constants": source.units}
    with PreemptionGuard() as guard, ExitStack() as resources:
        if jax.process_index() == 0:
            resources.enter_context(sole_user(workdir))
        recipe.write_to(workdir, source)
        run = _Run(recipe, epath.Path(workdir), frozen, initial, resources)
        for images, labels in run.batches(source):
            run.take_step(images, labels)
            done = run.step == fields.num_steps
            if done or run.is_due(fields.log_every):
                run.log()
            test_loss = None
            try:
                if preview and run.is_due(fields.sample_every):
                    run.complete_step()
                    preview(run.step, run.state.sampling_variables)
                if run.is_due(fields.evaluate_every):
                    test_loss = run.evaluate()
                stop = guard.requested()
            except Preempted:  # in the middle of a preview or an evaluation
                stop = True
            if done or stop or test_loss is not None or run.is_due(fields.checkpoint_every):
                run.save(test_loss)
            if stop:
                run.checkpoints.wait()
                raise Preempted(
                    f"asked to stop at step {run.step}; its state is saved, run the same command to continue",
                    guard.signal,
                )
    return run.state


def run_keys(seed: int) -> jax.Array:
    """Returns two keys: of the initial weights, and of the steps' noise and dropped labels."""
    # The constant is folded in so that sampling and evaluation never derive the same keys from the same seed.
    return jax.random.split(jax.random.fold_in(jax.random.key(seed), 0x747261696E % 2**31))


def evaluate_loss(recipe: Recipe, variables: dict[str, Any], frozen: Any = None) -> float:
    """Returns the test loss of a recipe's task."""
    return recipe.task.test_loss(BatchRunner(recipe.mesh()), variables, recipe.source("test"), frozen)


class _Run:
    """A run's state after `step` steps, and its output files."""

    def __init__(self, recipe: Recipe, workdir: epath.Path, frozen: Any, initial: Any, resources: ExitStack) -> None:
        fields, config = recipe.config.train, recipe.train_config
        self.recipe, self.fields, self.mesh = recipe, fields, recipe.mesh()
        init_key, self.key = run_keys(fields.seed)
        self.checkpoints = Checkpoints(workdir / "checkpoints", keep=fields.keep_checkpoints)
        resources.callback(self.checkpoints.close)
        shapes = abstract_state(config, self.mesh)
        if checkpoint := self.checkpoints.restore(shapes):
            self.step, self.state = checkpoint
            self.checkpoints.set_aside_after(self.step)
        else:
            self.step, self.state = 0, new_state(config, self.mesh, init_key, initial)
        self.frozen, self.program = _on_mesh(self.mesh, frozen), compiled_step(config, self.mesh)
        self.learning_rate = config.optimizer.schedule()
        self.metrics: MetricsWriter | None = None
        if jax.process_index() == 0:
            logger.info("mesh: %s", ", ".join(f"{axis}={size}" for axis, size in self.mesh.shape.items()))
            if self.step:
                logger.info("continuing from step %d", self.step)
            write_start(workdir, self.step)
            self.metrics = MetricsWriter(workdir, self.step)
            resources.callback(self.metrics.close)
        self.profile_folder, self.profile = workdir / "profile", resources.enter_context(ExitStack())
        bar = tqdm(total=fields.num_steps, initial=self.step, unit="step", disable=self.metrics is None, smoothing=0.05)
        self.bar = resources.enter_context(bar)
        self.step_seconds: list[float] = []  # of the steps since metrics were logged
        self.completed_at: float | None = None  # when the last step was
        self.in_flight: Metrics | None = None  # metrics of the running step
        self.last_metrics: dict[str, np.ndarray] = {}  # of the last completed step

    def batches(self, source: ImageSource | SequenceSource) -> Iterator[Batch]:
        """Yields on-device batches for the remaining steps."""
        fields, data, rows = self.fields, self.recipe.config.data, LocalBatch(self.mesh, self.fields.batch_size)
        batches = train_batches(
            source,
            batch_size=fields.batch_size,
            seed=fields.seed,
            flip=data.flip,
            start_step=self.step,
            rows=rows.local,
            num_workers=data.num_workers,
        )
        on_devices = prefetch_to_device(batches, lambda batch: jax.tree.map(rows.put, batch))
        return itertools.islice(on_devices, max(fields.num_steps - self.step, 0))

    def take_step(self, images: Any, labels: Any) -> None:
        """Starts a step, then checks the previous one, so that the devices never wait for the host."""
        number = self.step + 1
        if number == self.fields.profile_steps[0]:
            self.profile.enter_context(jax.profiler.trace(str(self.profile_folder)))
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            state, metrics = self.program(self.state, images, labels, self.key, self.frozen)
        if self.in_flight is None and not self.last_metrics:
            self.bar.unpause()  # its estimate leaves out the compilation before the first step
        self.complete_step()
        self.step, self.state, self.in_flight = number, state, metrics
        self.bar.update()

    def complete_step(self) -> None:
        """Waits for the running step and checks its metrics."""
        if self.in_flight is None:
            return
        self.last_metrics, self.in_flight = jax.device_get(self.in_flight), None
        now = time.perf_counter()
        if self.completed_at is not None:  # the first step compiles
            self.step_seconds.append(now - self.completed_at)
        self.completed_at = now
        if self.step >= self.fields.profile_steps[1]:
            self.profile.close()
        for name in ("loss", "grad_norm"):
            if not np.isfinite(value := self.last_metrics[name]):
                raise NonFiniteError(
                    f"{name} is {value} at step {self.step}; the run has stopped and its last checkpoint stays. "
                    "Lower optimizer.learning_rate or set optimizer.clip_norm"
                )

    def is_due(self, every: int) -> bool:
        """Returns whether the step is a multiple of `every`; never for 0."""
        return every > 0 and self.step % every == 0

    def log(self) -> None:
        self.complete_step()
        # The median leaves out the evaluations and previews between steps.
        images_per_second = self.fields.batch_size / np.median(self.step_seconds) if self.step_seconds else 0.0
        self.step_seconds.clear()
        self.bar.set_postfix_str(f"loss {self.last_metrics['loss']:.4f}, {images_per_second:.0f} images/s")
        if self.metrics:
            rates = {"learning_rate": self.learning_rate(self.step - 1), "images_per_second": images_per_second}
            self.metrics.write(self.step, {**self.last_metrics, **rates})

    def evaluate(self) -> float:
        self.complete_step()
        test_loss = evaluate_loss(self.recipe, self.state.sampling_variables, self.frozen)
        if self.metrics:
            self.metrics.write(self.step, {"test_loss": test_loss})
        return test_loss

    def save(self, test_loss: float | None) -> None:
        self.complete_step()
        self.checkpoints.save(self.step, self.state, json.loads(self.recipe.to_json()), test_loss)
        if self.metrics:
            self.metrics.flush()


def _on_mesh(mesh: Mesh, tree: Any) -> Any:
    """Replicates arrays over the mesh; those already on its devices stay as they are."""

    def placed(x: Any) -> jax.Array:
        on_mesh = isinstance(x, jax.Array) and x.sharding.device_set == set(mesh.devices.flat)
        return x if on_mesh else jax.device_put(x, replicated(mesh))

    return jax.tree.map(placed, tree)
