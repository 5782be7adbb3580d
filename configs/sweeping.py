"""Builds the overrides of a sweep: a list of dicts from field to value, one for each run.

A recipe that can be swept defines `sweep()`, with these functions or as a plain list:

    grid({"noise.std": [0.05, 0.1], "train.seed": [0, 1]})                        # four runs
    zipped({"model.num_blocks": [2, 4], "model.layers_per_block": [4, 2]})        # two runs
    sampled(8, {"optimizer.learning_rate": log_uniform(1e-4, 1e-2)}, seed=0)      # eight runs
    [a | b for a in grid(…) for b in zipped(…)]                                   # all pairs
"""

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Overrides = dict[str, Any]


def grid(fields: Mapping[str, Sequence[Any]]) -> list[Overrides]:
    """Returns all combinations of the fields' values; the last field changes fastest."""
    return [dict(zip(fields, values, strict=True)) for values in itertools.product(*fields.values())]


def zipped(fields: Mapping[str, Sequence[Any]]) -> list[Overrides]:
    """Pairs the first values of all fields, the second values, …; raises ValueError for lists of different lengths."""
    return [dict(zip(fields, values, strict=True)) for values in zip(*fields.values(), strict=True)]


def sampled(count: int, fields: Mapping[str, Callable[[random.Random], Any]], seed: int) -> list[Overrides]:
    """Draws `count` random points; a larger count has the smaller one's points first, so a sweep can grow."""
    generator = random.Random(seed)
    return [{name: draw(generator) for name, draw in fields.items()} for _ in range(count)]


def log_uniform(low: float, high: float) -> Callable[[random.Random], float]:
    """Draws a log-uniform number between `low` and `high`, rounded to three digits for the runs' names."""
    return lambda generator: float(f"{math.exp(generator.uniform(math.log(low), math.log(high))):.3g}")
