"""A run: state, data, steps, checkpoints, metrics. To continue it, run the same command again."""

import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath
from tqdm import tqdm

from tarflow_jax.data import Batch, ImageSource, prefetch_to_device, train_batches
from tarflow_jax.evaluation.split import loss_of, split_log_prob
from tarflow_jax.flow import TarFlow
from tarflow_jax.runtime import Preempted, PreemptionGuard, Rows, summary
from tarflow_jax.training.checkpoint import Checkpoints
from tarflow_jax.training.metrics import MetricsWriter
from tarflow_jax.training.recipe import Recipe
from tarflow_jax.training.state import TrainState
from tarflow_jax.training.step import Metrics, recipe_state, recipe_step

logger = logging.getLogger(__name__)
Preview = Callable[[int, dict[str, Any]], None]


class NonFiniteError(ArithmeticError):
    """A metric of a step is not a finite number; the run has stopped, its last checkpoint stays."""


def train(config: ml_collections.ConfigDict, workdir: epath.PathLike, preview: Preview | None = None) -> TrainState:
    """Trains until `config.train.num_steps`, from the workdir's last checkpoint on.

    Args:
      config: see configs/common.py.
      workdir: holds one run: config.json, checkpoints/, metrics.jsonl, tensorboard/. A local folder, which all
        processes see, or gs://.
      preview: called as preview(step, variables) every `train.sample_every` steps, on every process.

    Returns:
      The final state, sharded over the config's mesh.

    Raises:
      ValueError: an impossible config, or a workdir that holds another one.
      NonFiniteError: a loss or gradient norm is not finite.
      Preempted: SIGTERM came, at any time; the state is saved.
      OSError: a checkpoint could not be written.
    """
    recipe = Recipe(config)
    mesh = recipe.mesh()
    source = recipe.source("train")
    recipe.claim(workdir, write=jax.process_index() == 0)
    with PreemptionGuard() as guard:
        run = _Run(recipe, mesh, source, epath.Path(workdir), guard, preview)
        try:
            return run.to_the_end()
        finally:
            run.close()


class _Run:
    """What a run holds open, and its loop."""

    def __init__(
        self,
        recipe: Recipe,
        mesh: jax.sharding.Mesh,
        source: ImageSource,
        workdir: epath.Path,
        guard: PreemptionGuard,
        preview: Preview | None,
    ) -> None:
        fields = recipe.config.train
        self.recipe, self.fields, self.source, self.preview = recipe, fields, source, preview
        self.guard, self.mesh = guard, mesh
        self.key = jax.random.key(fields.seed)
        self.schedule = recipe.schedule()
        self.checkpoints = Checkpoints(workdir / "checkpoints", keep=fields.keep_checkpoints)
        self.step, shapes = recipe_step(recipe, mesh)
        found = self.checkpoints.restore(shapes)
        if found is None:
            self.start, self.state = 0, recipe_state(recipe, mesh, self.key)
        else:
            self.start, self.state = found
            self.checkpoints.set_aside_after(self.start)
        if jax.process_index() == 0:
            logger.info("%s", summary(mesh, shapes.variables))
            if self.start:
                logger.info("continuing from step %d", self.start)
        self.metrics = MetricsWriter(workdir, self.start) if jax.process_index() == 0 else None
        self.rows = Rows(mesh, fields.batch_size)

    def _put(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return self.rows.put(batch.image), self.rows.put(batch.label)

    def to_the_end(self) -> TrainState:
        fields, data = self.fields, self.recipe.config.data
        batches = train_batches(
            self.source,
            batch_size=fields.batch_size,
            seed=fields.seed,
            flip=data.flip,
            start_step=self.start,
            rows=self.rows.local,
            num_workers=data.num_workers,
        )
        with tqdm(
            total=fields.num_steps,
            initial=self.start,
            unit="step",
            disable=jax.process_index() != 0,
            smoothing=0.05,
        ) as bar:
            self._take_steps(prefetch_to_device(batches, self._put), bar)
        return self.state

    def _take_steps(self, batches: Iterator[tuple[jax.Array, jax.Array]], bar: tqdm) -> None:
        fields = self.fields
        running: Metrics | None = None
        for step, (images, labels) in enumerate(batches, self.start + 1):
            if step > fields.num_steps:
                break
            with jax.set_mesh(self.mesh):  # attention and accumulated gradients ask for it
                self.state, metrics = self.step(self.state, images, labels, self.key)
            if running is not None:
                # One step behind, so that the host never keeps the device waiting.
                self._check(step - 1, running)
            running = metrics
            bar.update()
            if step % fields.log_every == 0 or step == fields.num_steps:
                self._log(step, metrics, bar)
            self._after(step, metrics)

    def _check(self, step: int, metrics: Metrics) -> None:
        for name in ("loss", "grad_norm"):
            if not np.isfinite(np.asarray(metrics[name])):
                raise NonFiniteError(
                    f"{name} is {float(metrics[name])} at step {step}; the run has stopped and its last checkpoint "
                    "stays. Lower optimizer.learning_rate or set optimizer.clip_norm"
                )

    def _log(self, step: int, metrics: Metrics, bar: tqdm) -> None:
        rate = bar.format_dict["rate"]
        images_per_second = rate * self.fields.batch_size if rate else 0.0
        bar.set_postfix_str(f"loss {float(metrics['loss']):.4f}, {images_per_second:.0f} images/s")
        self._check(step, metrics)
        if self.metrics:
            rates = {"learning_rate": self.schedule(step - 1), "images_per_second": images_per_second}
            self.metrics.write(step, {**metrics, **rates})

    def _after(self, step: int, metrics: Metrics) -> None:
        """Evaluates, previews and saves where it is time to; a signal to stop cuts the first two short."""
        fields, test_loss = self.fields, None
        due = step == fields.num_steps or not step % fields.checkpoint_every
        try:
            if fields.evaluate_every and not step % fields.evaluate_every:
                test_loss = self._evaluate(step, metrics)
            if self.preview and fields.sample_every and not step % fields.sample_every:
                self.preview(step, self.state.sampling_variables)
            stop = self.guard.requested()
        except Preempted:
            stop = True
        if due or stop or test_loss is not None:
            self._check(step, metrics)
            self.checkpoints.save(step, self.state, json.loads(self.recipe.to_json()), test_loss)
            if self.metrics:
                self.metrics.flush()
        if stop:
            self.checkpoints.wait()
            raise Preempted(f"asked to stop at step {step}; its state is saved, run the same command to continue")

    def _evaluate(self, step: int, metrics: Metrics) -> float:
        self._check(step, metrics)
        test_loss = evaluate_loss(self.recipe, self.state.sampling_variables)
        if self.metrics:
            self.metrics.write(step, {"test_loss": test_loss})
        return test_loss

    def close(self) -> None:
        self.checkpoints.close()
        if self.metrics:
            self.metrics.close()


def evaluate_loss(recipe: Recipe, variables: dict[str, Any]) -> float:
    """The training loss of the test split: its noise fixed, its labels kept; nats per dimension less ½ log 2π."""
    mesh = recipe.mesh()
    log_probs = split_log_prob(
        TarFlow(recipe.model),
        variables,
        recipe.source("test"),
        recipe.noise,
        jax.random.key(0),
        batch_size=recipe.config.train.batch_size,
        mesh=mesh,
    )
    return loss_of(log_probs, recipe.model.num_dims)
