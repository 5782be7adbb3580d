"""A run: state, data, steps, checkpoints, metrics. To continue it, run the same command again."""

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from tqdm import tqdm

from tarflow_jax.data import Batch, ImageSource, prefetch_to_device, train_batches
from tarflow_jax.distributed import batch_sharding, summary
from tarflow_jax.evaluation.split import loss_of, split_log_prob
from tarflow_jax.flow import TarFlow
from tarflow_jax.training.checkpoint import Checkpoints
from tarflow_jax.training.metrics import MetricsWriter
from tarflow_jax.training.preemption import Preempted, PreemptionGuard
from tarflow_jax.training.recipe import Recipe
from tarflow_jax.training.state import TrainState, sharded_state
from tarflow_jax.training.step import Metrics, make_train_step

logger = logging.getLogger(__name__)
Preview = Callable[[int, dict[str, Any]], None]


class NonFiniteError(ArithmeticError):
    """A metric of a step is not a finite number; the run has stopped, its last checkpoint stays."""


def train(config: ml_collections.ConfigDict, workdir: Path, preview: Preview | None = None) -> TrainState:
    """Trains until `config.train.num_steps`, from the workdir's last checkpoint on.

    Args:
      config: see configs/common.py.
      workdir: holds one run: config.json, checkpoints/, metrics.jsonl, tensorboard/.
      preview: called as preview(step, variables) every `train.sample_every` steps, on every process.

    Returns:
      The final state, sharded over the config's mesh.

    Raises:
      ValueError: an impossible config, or a workdir that holds another one.
      NonFiniteError: a loss or gradient norm is not finite.
      Preempted: SIGTERM came; the state is saved.
    """
    recipe = Recipe(config)
    mesh = recipe.mesh()
    source = recipe.source("train")
    if jax.process_index() == 0:
        recipe.claim(workdir)
    with PreemptionGuard() as guard:
        run = _Run(recipe, mesh, source, workdir, guard, preview)
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
        workdir: Path,
        guard: PreemptionGuard,
        preview: Preview | None,
    ) -> None:
        fields = recipe.config.train
        self.recipe, self.fields, self.source, self.preview = recipe, fields, source, preview
        self.guard, self.mesh = guard, mesh
        self.key = jax.random.key(fields.seed)
        self.schedule = recipe.schedule()
        flow, optimizer = TarFlow(recipe.model), recipe.optimizer()
        self.checkpoints = Checkpoints(workdir / "checkpoints", keep=fields.keep_checkpoints)
        self.state, layout = sharded_state(
            flow, optimizer, self.key, mesh, ema=recipe.config.optimizer.ema_decay > 0
        )
        self.start = self._resume()
        if jax.process_index() == 0:
            logger.info("%s", summary(mesh, self.state.variables))
        self.metrics = MetricsWriter(workdir, self.start) if jax.process_index() == 0 else None
        self.rows = batch_sharding(mesh)
        step = make_train_step(
            flow,
            optimizer,
            recipe.noise,
            drop_label=fields.drop_label,
            ema_decay=recipe.config.optimizer.ema_decay,
            accumulation=fields.accumulation,
        )
        self.step = jax.jit(step, donate_argnums=0, out_shardings=(layout, None))

    def _resume(self) -> int:
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), self.state
        )
        found = self.checkpoints.restore(shapes)
        if found is None:
            return 0
        step, self.state = found
        logger.info("continuing from step %d", step)
        return step

    def _put(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        put = functools.partial(jax.make_array_from_process_local_data, self.rows)
        return put(batch.image), put(batch.label)

    def to_the_end(self) -> TrainState:
        fields, data = self.fields, self.recipe.config.data
        batches = train_batches(
            self.source,
            batch_size=fields.batch_size,
            seed=fields.seed,
            flip=data.flip,
            start_step=self.start,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            num_workers=data.num_workers,
        )
        bar = tqdm(
            total=fields.num_steps,
            initial=self.start,
            unit="step",
            disable=jax.process_index() != 0,
            smoothing=0.05,
        )
        running: Metrics | None = None
        for step, (images, labels) in enumerate(prefetch_to_device(batches, self._put), self.start + 1):
            if step > fields.num_steps:
                break
            with jax.set_mesh(self.mesh):  # attention kernels that XLA cannot partition ask for it
                self.state, metrics = self.step(self.state, images, labels, self.key)
            if running is not None:
                # One step behind, so that the host never keeps the device waiting.
                self._check(step - 1, running)
            running = metrics
            bar.update()
            if step % fields.log_every == 0 or step == fields.num_steps:
                self._log(step, metrics, bar)
            self._after(step, metrics)
        bar.close()
        return self.state

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
        """Saves and previews where it is time to."""
        fields, last = self.fields, step == self.fields.num_steps
        stop = self._stop_requested()
        if step % fields.checkpoint_every == 0 or last or stop:
            self._check(step, metrics)
            self.checkpoints.save(step, self.state)
        if self.preview and fields.sample_every and step % fields.sample_every == 0 and not stop:
            self.preview(step, self.state.sampling_variables)
        if stop and not last:
            self.checkpoints.wait()
            raise Preempted(
                f"asked to stop at step {step}; its state is saved, run the same command to continue"
            )

    def _stop_requested(self) -> bool:
        """Whether any process was asked to stop; all must agree, for a checkpoint is written by all."""
        if jax.process_count() == 1:
            return self.guard.requested
        from jax.experimental import multihost_utils

        return bool(multihost_utils.process_allgather(jnp.int32(self.guard.requested)).any())

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
