"""A run: state, data, steps, checkpoints, metrics. To continue it, run the same command again."""

import contextlib
import itertools
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath
from tqdm import tqdm

from tarflow_jax.data import Batch, ImageSource, prefetch_to_device, train_batches
from tarflow_jax.evaluation.bits_per_dim import loss_of, split_log_prob
from tarflow_jax.files import sole_user
from tarflow_jax.likelihood import unit_prior
from tarflow_jax.runtime import (
    BatchRunner,
    Preempted,
    PreemptionGuard,
    Rows,
    replicated,
    summary,
    use_cores_as_devices,
)
from tarflow_jax.training.checkpoint import Checkpoints
from tarflow_jax.training.clock import Profiler, StepClock
from tarflow_jax.training.metrics import MetricsWriter
from tarflow_jax.training.recipe import Recipe
from tarflow_jax.training.state import TrainState, abstract_state, new_state
from tarflow_jax.training.step import Metrics, compiled_step
from tarflow_jax.training.student_error import split_errors
from tarflow_jax.training.workdir import write_start

logger = logging.getLogger(__name__)
Preview = Callable[[int, dict[str, Any]], None]
# Folded into a run's seed, so that no key of training is one that sampling or evaluation makes of the same seed.
_TEST_LEVELS = 8  # noise levels that a test loss is the mean of
_TRAINING = 0x747261696E % 2**31


class NonFiniteError(ArithmeticError):
    """A metric of a step is not a finite number; the run has stopped, its last checkpoint stays."""


def train(
    config: ml_collections.ConfigDict,
    workdir: epath.PathLike,
    preview: Preview | None = None,
    frozen_flow: dict[str, Any] | None = None,
    perception: dict[str, Any] | None = None,
) -> TrainState:
    """Trains until `config.train.num_steps`, from the workdir's last checkpoint on.

    Args:
      config: see configs/common.py.
      workdir: holds one run: config.json, starts.jsonl, checkpoints/, metrics.jsonl, tensorboard/. A local folder,
        which all processes see, or gs://.
      preview: called as preview(step, variables) every `train.sample_every` steps, on every process.
      frozen_flow: variables of the flow by which a recipe's student is trained.
      perception: parameters of the `Perception` by which it is, if its recipe has one.

    Returns:
      The final state, sharded over the config's mesh.

    Raises:
      ValueError: an impossible config, a workdir that holds another one, or one that another process trains in.
      NonFiniteError: a loss or gradient norm is not finite.
      Preempted: SIGTERM, SIGINT or SIGHUP came, at any time; the state is saved.
      OSError: a checkpoint could not be written.
    """
    recipe, fields = Recipe(config), config.train
    if config.mesh.data == -1:
        use_cores_as_devices(fields.batch_size // fields.accumulation)
    source = recipe.source("train")
    with PreemptionGuard() as guard, contextlib.ExitStack() as resources:
        if jax.process_index() == 0:
            resources.enter_context(sole_user(workdir))
        recipe.write_to(workdir, source)
        run = _Run(recipe, source, epath.Path(workdir), resources, frozen_flow, perception)
        for images, labels in run.batches():
            run.take_step(images, labels)
            done = run.step == fields.num_steps
            if done or run.is_due(fields.log_every):
                run.log()
            test_loss = None
            try:
                if preview and run.is_due(fields.sample_every):
                    run.preview(preview)
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


class _Run:
    """A run's state, and what it reads and writes.

    Attributes:
      step: the last one taken. state: after it.
    """

    def __init__(
        self,
        recipe: Recipe,
        source: ImageSource,
        workdir: epath.Path,
        resources: contextlib.ExitStack,
        frozen_flow: dict[str, Any] | None,
        perception: dict[str, Any] | None,
    ) -> None:
        """Begins or continues; closing `resources` closes everything, although one of it fails."""
        fields = recipe.config.train
        self.recipe, self.source, self.fields, self.mesh = recipe, source, fields, recipe.mesh()
        init_key, self.key = run_keys(fields.seed)
        self.checkpoints = Checkpoints(workdir / "checkpoints", keep=fields.keep_checkpoints)
        resources.callback(self.checkpoints.close)
        shapes = abstract_state(recipe.train_config, self.mesh)
        found = self.checkpoints.restore(shapes)
        if found is None:
            self.step, self.state = 0, new_state(recipe.train_config, self.mesh, init_key)
        else:
            self.step, self.state = found
            self.checkpoints.set_aside_after(self.step)
        self.frozen_flow = None if frozen_flow is None else BatchRunner(self.mesh).place(frozen_flow)
        self.perception = None if perception is None else jax.device_put(perception, replicated(self.mesh))
        self.program = compiled_step(recipe.train_config, self.mesh)
        self.rows = Rows(self.mesh, fields.batch_size)
        first_process = jax.process_index() == 0
        if first_process:
            logger.info("%s", summary(self.mesh, shapes.variables))
            if self.step:
                logger.info("continuing from step %d", self.step)
            write_start(workdir, self.step)
        self.metrics = MetricsWriter(workdir, self.step) if first_process else None
        if self.metrics:
            resources.callback(self.metrics.close)
        self.profiler = resources.enter_context(Profiler(workdir / "profile", fields.profile_steps))
        self.bar = resources.enter_context(
            tqdm(total=fields.num_steps, initial=self.step, unit="step", disable=not first_process, smoothing=0.05)
        )
        self.clock = StepClock()
        self._pending: Metrics | None = None  # of the step under way
        self._settled: Metrics = {}

    def batches(self) -> Iterator[tuple[jax.Array, jax.Array]]:
        """Images and labels on the devices, of the steps that are left."""
        fields, data = self.fields, self.recipe.config.data
        host = train_batches(
            self.source,
            batch_size=fields.batch_size,
            seed=fields.seed,
            flip=data.flip,
            start_step=self.step,
            rows=self.rows.local,
            num_workers=data.num_workers,
        )

        def put(batch: Batch) -> tuple[jax.Array, jax.Array]:
            return self.rows.put(batch.image), self.rows.put(batch.label)

        left = max(fields.num_steps - self.step, 0)
        return itertools.islice(prefetch_to_device(host, put), left)

    def take_step(self, images: jax.Array, labels: jax.Array) -> None:
        """Starts a step, and checks the one before: so the host never keeps the devices waiting."""
        with self.profiler.step(self.step + 1):
            state, metrics = self.program(self.state, images, labels, self.key, self.frozen_flow, self.perception)
        self.settle()
        self.step, self.state, self._pending = self.step + 1, state, metrics
        self.bar.update()

    def settle(self) -> Metrics:
        """Waits for the step under way and checks it; the last step's metrics."""
        if self._pending is not None:
            self._settled, self._pending = jax.device_get(self._pending), None
            self.clock.step_done()
            self.profiler.step_done(self.step)
            for name in ("loss", "grad_norm"):
                if not np.isfinite(self._settled[name]):
                    raise NonFiniteError(
                        f"{name} is {self._settled[name]} at step {self.step}; the run has stopped and its last "
                        "checkpoint stays. Lower optimizer.learning_rate or set optimizer.clip_norm"
                    )
        return self._settled

    def is_due(self, every: int) -> bool:
        """Whether something that is done every so many steps is to be done now; 0 is never."""
        return every > 0 and self.step % every == 0

    def log(self) -> None:
        """Writes the last step's metrics."""
        metrics = dict(self.settle())
        images_per_second = self.clock.rate() * self.fields.batch_size
        self.bar.set_postfix_str(f"loss {metrics['loss']:.4f}, {images_per_second:.0f} images/s")
        if self.metrics:
            learning_rate = self.recipe.train_config.optimizer.schedule()(self.step - 1)
            rates = {"learning_rate": learning_rate, "images_per_second": images_per_second}
            if "quarter_losses" in metrics:  # a quarter without an image has none
                with np.errstate(invalid="ignore"):
                    rates["level_losses"] = metrics.pop("quarter_losses") / metrics.pop("quarter_shares")
            self.metrics.write(self.step, {**metrics, **rates})

    def preview(self, draw: Preview) -> None:
        """Lets the caller draw."""
        self.settle()
        draw(self.step, self.state.sampling_variables)
        self.clock.pause()

    def evaluate(self) -> float:
        """The test loss, which is written too."""
        self.settle()
        test_loss = evaluate_loss(self.recipe, self.state.sampling_variables, self.frozen_flow)
        if self.metrics:
            self.metrics.write(self.step, {"test_loss": test_loss})
        self.clock.pause()
        return test_loss

    def save(self, test_loss: float | None) -> None:
        """Starts to write a checkpoint."""
        self.settle()
        self.checkpoints.save(self.step, self.state, json.loads(self.recipe.to_json()), test_loss)
        if self.metrics:
            self.metrics.flush()
        self.clock.pause()


def run_keys(seed: int) -> tuple[jax.Array, jax.Array]:
    """Keys of the initial weights, and of the steps' noise and dropped labels."""
    init_key, step_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), _TRAINING))
    return init_key, step_key


def evaluate_loss(recipe: Recipe, variables: dict[str, Any], frozen_flow: dict[str, Any] | None = None) -> float:
    """The training loss of the test split: its noise fixed, its labels kept; nats per dimension less ½ log 2π.

    Noise levels come in turn, from image to image. Of a student, the mean square error of the clean images.
    """
    noise = recipe.noise
    if recipe.student:
        errors = split_errors(
            BatchRunner(recipe.mesh()),
            recipe.train_config,
            (frozen_flow, variables),
            recipe.source("test"),
            jax.random.key(0),
        )
        return float(errors.mean(dtype=np.float64))
    levels = noise.quantiles(_TEST_LEVELS) if noise.kind == "levels" else None
    log_probs = split_log_prob(
        BatchRunner(recipe.mesh()),
        recipe.model,
        unit_prior(variables),
        recipe.source("test"),
        noise,
        jax.random.key(0),
        levels,
    )
    if levels is None:
        return loss_of(log_probs, recipe.model.num_dims)
    of_level = [loss_of(log_probs[i::_TEST_LEVELS], recipe.model.num_dims) for i in range(_TEST_LEVELS)]
    return float(np.mean(np.asarray(noise.weights(jnp.asarray(levels))) * of_level))
