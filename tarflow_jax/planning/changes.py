"""What to change of a recipe that does not fit, the smallest change first; and of one that does, for speed."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

from tarflow_jax.flow.config import REMAT_POLICIES
from tarflow_jax.planning.plan import Plan
from tarflow_jax.training import Recipe

logger = logging.getLogger(__name__)
Change = dict[str, Any]  # config fields, "train.batch_size", to new values
_WORTH = 0.98  # of the bound, at most, for a change to be worth it


def smallest_change(recipe: Recipe, plan: Plan, make_plan: Callable[[Recipe], Plan]) -> tuple[Change, Plan] | None:
    """Compiles one change after another of a recipe that does not fit (its plan is `plan`), until one fits.

    `make_plan` compiles a changed recipe for the same topology. Returns the change that fits, and its plan.
    """
    for change in changes(recipe, plan):
        logger.info("does not fit: trying %s", as_flags(change))
        tried = make_plan(changed(recipe, change))
        if tried.fits:
            return change, tried
    return None


def lowest_bound(recipe: Recipe, plan: Plan, make_plan: Callable[[Recipe], Plan]) -> tuple[Change, Plan]:
    """Compiles changes of a recipe that fits, until none brings its step's lower bound down.

    It goes from one setting to the first better one beside it, of other accumulation, sharding of the parameters or
    recomputing. Arguments as of `smallest_change`. Returns the change and its plan.
    """
    best: Change = {"train.accumulation": recipe.config.train.accumulation, "model.remat": recipe.config.model.remat}
    tried = [best]
    while True:
        for neighbour in _neighbours(changed(recipe, best), plan):
            change = best | neighbour
            if change in tried:
                continue
            logger.info("trying %s", as_flags(change))
            tried.append(change)
            found = make_plan(changed(recipe, change))
            if found.fits and found.bound < _WORTH * plan.bound:
                best, plan = change, found
                break
        else:
            return best, plan


def _neighbours(recipe: Recipe, plan: Plan) -> Iterator[Change]:
    config, sizes = recipe.config, plan.mesh
    rows = config.train.batch_size // (sizes["data"] * sizes["fsdp"])
    for count in (2 * config.train.accumulation, config.train.accumulation // 2):
        if count and rows % count == 0:
            yield {"train.accumulation": count}
    own_data = sizes["data"] // plan.topology.slices
    if own_data > 1 and recipe.model.width % (sizes["fsdp"] * own_data) == 0:
        yield {"mesh.data": plan.topology.slices, "mesh.fsdp": sizes["fsdp"] * own_data}
    yield from ({"model.remat": remat} for remat in reversed(REMAT_POLICIES) if remat != config.model.remat)


def changes(recipe: Recipe, plan: Plan) -> Iterator[Change]:
    """Changes to try in turn, until one fits.

    First those that leave the result alone, each with less speed than the one before: recomputing, accumulating,
    sharding the parameters over `fsdp`, both; then a smaller batch. What cannot help, because parameters and optimizer
    alone do not fit, is left out.
    """
    config, sizes = recipe.config, plan.mesh
    shards = sizes["data"] * sizes["fsdp"]
    state_fits = sum(plan.state_bytes.values()) < plan.topology.chip.memory
    remat = [{"model.remat": "full"}] if config.model.remat != "full" else []
    rows = config.train.batch_size // shards // config.train.accumulation
    accumulations = [n * config.train.accumulation for n in _doublings(rows) if rows % n == 0]
    shardings = [
        {"mesh.data": sizes["data"] // n, "mesh.fsdp": sizes["fsdp"] * n}
        for n in _doublings(sizes["data"] // plan.topology.slices)
        if sizes["data"] % n == 0 and recipe.model.width % (sizes["fsdp"] * n) == 0
    ]
    if state_fits:
        yield from remat
        yield from ({**_first(remat), "train.accumulation": n} for n in accumulations)
    yield from ({**_first(remat), **sharding} for sharding in shardings)
    if accumulations and shardings:
        yield {**_first(remat), **shardings[-1], "train.accumulation": accumulations[-1]}
    for n in _doublings(rows):
        smaller = {"train.batch_size": config.train.batch_size // n}
        if rows % n == 0:
            yield {**_first(remat), **(shardings[-1] if shardings and not state_fits else {}), **smaller}


def changed(recipe: Recipe, change: Change) -> Recipe:
    """The recipe with other values in some fields."""
    config = recipe.config.copy_and_resolve_references()
    config.update_from_flattened_dict(change)
    return Recipe(config)


def as_flags(change: Change) -> str:
    """The change as the commands take it."""
    return " ".join(f"--config.{name}={value}" for name, value in change.items())


def dividing_options(recipe: Recipe, num_devices: int) -> list[Change]:
    """Meshes and batches that divide, for a batch that does not divide by the devices."""
    fields, heads = recipe.config.train, recipe.model.num_heads
    batch = fields.batch_size // fields.accumulation
    options: list[Change] = []
    for tensor in (n for n in range(1, num_devices + 1) if num_devices % n == 0 and heads % n == 0):
        if batch % (num_devices // tensor) == 0:
            options.append({"mesh.data": num_devices // tensor, "mesh.tensor": tensor})
            break
    return [*options, {"train.batch_size": -(-batch // num_devices) * num_devices * fields.accumulation}]


def _doublings(limit: int) -> list[int]:
    """2, 4, 8, … up to the limit."""
    return [2**k for k in range(1, max(limit, 1).bit_length())]


def _first(options: list[Change]) -> Change:
    return options[0] if options else {}
