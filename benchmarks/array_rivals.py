"""Fits flows of arrays with `tarflow_jax.fit` and with other packages, each for the same CPU seconds.

Needs `pip install flowjax zuko`. flowjax's coupling flow and masked autoregressive flow have rational quadratic
splines, as does zuko's neural spline flow. All are trained as `fit` trains: columns standardised, a tenth held out,
batches of 256, the best validation loss kept, the gradient clipped to a norm of 1, Adam with warm-up and a cosine decay
of the learning rate to 0 (by time). Use a process with one core, because seconds are summed over its threads.
"""

import argparse
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import flowjax.bijections as bij
import flowjax.flows
import jax
import jax.numpy as jnp
import numpy as np
import optax
import paramax
from flowjax.distributions import Normal

import tarflow_jax
from benchmarks.common import json_lines

BATCH_SIZE = 256
NUM_VALIDATIONS = 40
WARMUP = 0.05  # of the time
TUNING_SEED = 100
Measure = Callable[[str, dict[str, Any], float, int], dict[str, object]]  # method, setting, seconds, seed -> a row
_compiled = 0.0  # seconds of XLA's compilation that `_clock` leaves out
_pace: dict[tuple[str, tuple[int, ...]], tuple[float, float]] = {}  # seconds a step, and of a fit of 40 steps


def _clock() -> float:
    return time.process_time() - _compiled


def leave_out_compilation() -> None:
    """From now on, the seconds of a fit are those without XLA's compilation."""

    def add(event: str, seconds: float, **_: Any) -> None:
        global _compiled
        _compiled += seconds if event == "/jax/core/compile/backend_compile_duration" else 0.0

    jax.monitoring.register_event_duration_secs_listener(add)


class Fitted(NamedTuple):
    """A density of x [N, F], given conditions [N, C] or None."""

    log_prob: Callable[[np.ndarray, np.ndarray | None], np.ndarray]  # nats [N]
    sample: Callable[[int, np.ndarray], np.ndarray]  # seed and conditions [N, C] -> [N, F]
    validation: float  # mean log p of the rows that were held out
    num_steps: int
    seconds: float

    @property
    def figures(self) -> dict[str, object]:
        """What a row tells of the fit itself."""
        return {
            "validation": round(self.validation, 5),
            "num_steps": self.num_steps,
            "taken": round(self.seconds, 1),
        }


# What is tried on every target; the best validation decides. A token may be several columns of a table.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "tarflow_jax": [
        {"width": 16, "head_dim": 16, "num_blocks": 12, "weight_decay": 0.03},
        {"width": 32, "num_blocks": 8, "weight_decay": 0.1},
        {"width": 64, "num_blocks": 6, "weight_decay": 1.0},
    ],
    "flowjax coupling": [
        {"flow_layers": layers, "nn_width": width, "rate": rate}
        for layers, width, rate in ((8, 64, 5e-3), (5, 128, 2e-3), (12, 64, 2e-3))
    ],
    "flowjax autoregressive": [
        {"flow_layers": layers, "nn_width": width, "rate": rate}
        for layers, width, rate in ((5, 64, 5e-3), (3, 128, 2e-3), (8, 64, 2e-3))
    ],
    "zuko spline": [
        {"transforms": transforms, "width": width, "rate": rate}
        for transforms, width, rate in ((3, 64, 5e-3), (3, 128, 2e-3), (5, 64, 2e-3))
    ],
}

# In their place for tables of fewer than 1,000 rows: narrower networks, noise as a fraction of the columns' deviations.
FEW_ROWS = ("iris", "wine", "diabetes", "breast cancer")
SETTINGS_OF_FEW_ROWS: dict[str, list[dict[str, Any]]] = {
    "tarflow_jax": [
        {"width": width, "num_blocks": blocks, "noise": noise}
        for width, blocks, noise in ((32, 4, 0.1), (32, 4, 0.2), (64, 6, 0.3))
    ],
    "flowjax coupling": [
        {"flow_layers": layers, "nn_width": width, "rate": 2e-3, "noise": noise}
        for layers, width, noise in ((5, 32, 0.1), (5, 32, 0.2), (8, 64, 0.3))
    ],
    "flowjax autoregressive": [
        {"flow_layers": layers, "nn_width": width, "rate": 2e-3, "noise": noise}
        for layers, width, noise in ((3, 32, 0.1), (3, 32, 0.2), (5, 64, 0.3))
    ],
    "zuko spline": [
        {"transforms": 3, "width": width, "rate": 2e-3, "noise": noise}
        for width, noise in ((32, 0.1), (32, 0.2), (64, 0.3))
    ],
}

# Replaces fields of our settings. Columns that form one token have a triangular map.
OURS: dict[str, dict[str, Any]] = {
    "gaussian 6": {"columns_a_token": 3, "triangular": True},
    "gaussian 64": {"columns_a_token": 64, "triangular": True},
    "two_moons": {"weight_decay": 0.03},
    "slcp": {"weight_decay": 0.1},
    "breast cancer": {"columns_a_token": 5, "triangular": True},
}


def fit(method: str, setting: dict[str, Any], x: np.ndarray, c: np.ndarray | None, seconds: float, seed: int) -> Fitted:
    """Fits a flow to x [N, F], given c [N, C], in about `seconds` of the processor."""
    if method == "tarflow_jax":
        return fit_tarflow(setting, x, c, seconds, seed)
    columns = x if c is None else np.concatenate([x, c], axis=1)
    mean, std = columns.mean(0, dtype=np.float64), columns.std(0, dtype=np.float64)
    size = x.shape[1]

    def standardise(x: np.ndarray, c: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
        x = (x - mean[:size]) / std[:size]
        return x.astype(np.float32), None if c is None else ((c - mean[size:]) / std[size:]).astype(np.float32)

    make = zuko_flow if method.startswith("zuko") else flowjax_flow
    x, c = standardise(x, c)
    flow = make(method, setting, size, 0 if c is None else c.shape[1], seed)
    order = np.random.default_rng(seed).permutation(len(x))
    held_out, rows = np.split(order, [len(x) // 10])
    taken = train(flow, setting["rate"], setting.get("noise", 0.0), x, c, held_out, rows, seconds, seed)

    def log_prob(x: np.ndarray, c: np.ndarray | None) -> np.ndarray:
        return flow.log_prob(*standardise(x, c)) - np.log(std[:size]).sum()

    def sample(seed: int, c: np.ndarray) -> np.ndarray:
        return flow.sample(seed, standardise(np.zeros((len(c), size)), c)[1]) * std[:size] + mean[:size]

    return Fitted(log_prob, sample, taken.validation - float(np.log(std[:size]).sum()), taken.num_steps, taken.seconds)


def fit_tarflow(setting: dict[str, Any], x: np.ndarray, c: np.ndarray | None, seconds: float, seed: int) -> Fitted:
    """`tarflow_jax.fit` with as many steps as take the seconds, its compilation included."""
    columns_a_token = setting.get("columns_a_token")
    shape = {name: value for name, value in setting.items() if name != "columns_a_token"}

    def tokens(x: np.ndarray) -> np.ndarray:
        return x.reshape(len(x), -1, columns_a_token) if columns_a_token else x

    def timed(num_steps: int) -> tuple[Any, float]:
        start = _clock()
        flow = tarflow_jax.fit(
            tokens(x), c, num_steps=num_steps, batch_size=BATCH_SIZE, key=jax.random.key(seed), **shape
        )
        return flow, _clock() - start

    kind = (str(setting), x.shape)
    if not _pace:
        timed(4)  # imports what later fits have
    if kind not in _pace:
        (_, short), (_, longer) = timed(40), timed(400)  # each compiles
        _pace[kind] = max((longer - short) / 360, 1e-3), short
    for _ in range(4):  # until the pace holds: a fit should be no longer and no shorter than the others'
        a_step, short = _pace[kind]
        num_steps = max(int((seconds - short) / a_step) + 40, 41)
        flow, taken = timed(num_steps)
        # `fit` stops when the best step is half of all steps ago.
        taken_steps = min(num_steps, flow.card["training"]["steps"] + num_steps // 2)
        if taken_steps > 200:
            _pace[kind] = max((taken - short) / (taken_steps - 40), 1e-3), short
        if num_steps == 41 or (taken < 1.1 * seconds and (taken_steps < num_steps or taken > 0.9 * seconds)):
            break
    return Fitted(
        lambda x, c: np.asarray(flow.log_prob(tokens(x).astype(np.float32), condition=c)),
        lambda seed, c: np.asarray(flow.sample(jax.random.key(seed), len(c), condition=c)).reshape(len(c), -1),
        flow.card["metrics"]["log p of rows held out (nats)"],
        num_steps,
        taken,
    )


def run(
    description: str,
    measures: Mapping[str, Measure],
    rows: str,
    seconds: float,
    seeds: int,
    methods: Iterable[str] = tuple(SETTINGS),
    tuning: float = 0.5,
) -> None:
    """The command of a benchmark on one core: tunes and measures the methods on the data sets that --names asks for."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", default=",".join(measures), help="of data sets, with commas between them")
    parser.add_argument("--methods", default=",".join(methods), help="with commas between them")
    parser.add_argument(
        "--seconds", type=float, default=seconds, help=f"of one core, for a fit; {tuning:g} of it to tune"
    )
    parser.add_argument("--seeds", type=int, default=seeds, help="fits by each method, once it is tuned")
    parser.add_argument("--rows", type=Path, default=Path(rows), help="file to append to")
    args = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    for name in args.names.split(","):
        compare(args.rows, name, args.methods.split(","), measures[name], args.seconds, args.seeds, tuning)


def compare(
    file: Path,
    name: str,
    methods: Iterable[str],
    measure: Measure,
    seconds: float,
    seeds: int,
    tuning: float,
) -> None:
    """Tunes and measures each method on a data set; appends the rows that a file [JSON lines] lacks.

    `measure` maps method, setting, seconds and seed to a row.
    """
    known = json_lines(file)

    def row(method: str, setting: dict[str, Any], seconds: float, seed: int) -> dict[str, Any]:
        asked = {"target": name, "method": method, "setting": setting, "budget": seconds, "seed": seed}
        for found in known:
            if asked.items() <= found.items():
                return found
        made = asked | measure(method, setting, seconds, seed) | {"date": time.strftime("%Y-%m-%d")}
        with file.open("a") as out:
            out.write(json.dumps(made) + "\n")
        print(json.dumps(made), flush=True)
        return made

    for method in methods:
        settings = (SETTINGS_OF_FEW_ROWS if name in FEW_ROWS else SETTINGS)[method]
        if method == "tarflow_jax":
            settings = [setting | OURS.get(name, {}) for setting in settings]
        tried = [row(method, setting, seconds * tuning, TUNING_SEED) for setting in settings]
        best = max(tried, key=lambda row: row["validation"])["setting"]
        for seed in range(seeds):
            row(method, best, seconds, seed)


class Flow(NamedTuple):
    """A standardised density that can be trained."""

    step: Callable[[np.ndarray, np.ndarray | None, float], None]  # x [B, F], c [B, C], learning rate
    log_prob: Callable[[np.ndarray, np.ndarray | None], np.ndarray]
    sample: Callable[[int, np.ndarray], np.ndarray]
    keep: Callable[[], None]  # the parameters of now are the best
    restore: Callable[[], None]


def train(
    flow: Flow,
    peak: float,
    noise: float,
    x: np.ndarray,
    c: np.ndarray | None,
    held_out: np.ndarray,
    rows: np.ndarray,
    seconds: float,
    seed: int,
) -> Fitted:
    """Trains until the processor's seconds are over; densities of the result are those of standardised columns."""
    rng, start = np.random.default_rng(seed), _clock()
    best, number, next_check = -np.inf, 0, 1 / NUM_VALIDATIONS
    size = min(BATCH_SIZE, len(rows))
    while (share := (_clock() - start) / seconds) < 1:
        if number % (len(rows) // size) == 0:
            shuffled = rng.permutation(rows)
        first = number % (len(rows) // size) * size
        batch = shuffled[first : first + size]
        rate = peak * min(share / WARMUP, 0.5 * (1 + np.cos(np.pi * share)))
        points = x[batch]
        if noise:
            points = points + noise * rng.normal(size=points.shape).astype(np.float32)
        flow.step(points, None if c is None else c[batch], rate)
        number += 1
        if share >= next_check:
            next_check += 1 / NUM_VALIDATIONS
            found = float(np.mean(flow.log_prob(x[held_out], None if c is None else c[held_out])))
            if found > best:
                best = found
                flow.keep()
    flow.restore()
    return Fitted(flow.log_prob, flow.sample, best, number, _clock() - start)


def flowjax_flow(method: str, setting: dict[str, Any], size: int, num_conditions: int, seed: int) -> Flow:
    """A flow of flowjax."""
    kind = flowjax.flows.coupling_flow if "coupling" in method else flowjax.flows.masked_autoregressive_flow
    made = kind(
        jax.random.key(seed),
        base_dist=Normal(jnp.zeros(size)),
        transformer=bij.RationalQuadraticSpline(knots=8, interval=5),
        cond_dim=num_conditions or None,
        flow_layers=setting["flow_layers"],
        nn_width=setting["nn_width"],
        nn_depth=2,
    )
    params, static = eqx.partition(
        made, eqx.is_inexact_array, is_leaf=lambda leaf: isinstance(leaf, paramax.NonTrainable)
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())

    def whole(params: Any) -> Any:
        return paramax.unwrap(eqx.combine(params, static))

    @jax.jit
    def update(params: Any, state: Any, x: jax.Array, c: jax.Array | None, rate: float) -> tuple[Any, Any]:
        gradient = jax.grad(lambda params: -whole(params).log_prob(x, c).mean())(params)
        updates, state = optimizer.update(gradient, state)
        return jax.tree.map(lambda p, u: p - rate * u, params, updates), state

    evaluate = jax.jit(lambda params, x, c: whole(params).log_prob(x, c))
    draw = jax.jit(lambda params, keys, c: jax.vmap(lambda key, c: whole(params).sample(key, (), c))(keys, c))
    now: dict[str, Any] = {"params": params, "state": optimizer.init(params), "best": params}

    def step(x: np.ndarray, c: np.ndarray | None, rate: float) -> None:
        now["params"], now["state"] = jax.block_until_ready(update(now["params"], now["state"], x, c, rate))

    return Flow(
        step,
        lambda x, c: np.asarray(evaluate(now["params"], x, c)),
        lambda seed, c: np.asarray(draw(now["params"], jax.random.split(jax.random.key(seed), len(c)), c)),
        lambda: now.update(best=now["params"]),
        lambda: now.update(params=now["best"]),
    )


def zuko_flow(method: str, setting: dict[str, Any], size: int, num_conditions: int, seed: int) -> Flow:
    """zuko's neural spline flow, fully autoregressive."""
    import torch
    import zuko

    torch.manual_seed(seed)
    torch.set_num_threads(1)
    made = zuko.flows.NSF(
        size,
        num_conditions,
        transforms=setting["transforms"],
        hidden_features=[setting["width"]] * 2,
        randperm=size > 2,
    )
    optimizer = torch.optim.Adam(made.parameters())
    best: dict[str, Any] = {}

    def given(c: np.ndarray | None) -> Any:
        return made(None if c is None else torch.from_numpy(c))

    def step(x: np.ndarray, c: np.ndarray | None, rate: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        (-given(c).log_prob(torch.from_numpy(x)).mean()).backward()
        torch.nn.utils.clip_grad_norm_(made.parameters(), 1.0)
        optimizer.step()

    def log_prob(x: np.ndarray, c: np.ndarray | None) -> np.ndarray:
        with torch.no_grad():
            return given(c).log_prob(torch.from_numpy(x)).numpy()

    def sample(seed: int, c: np.ndarray) -> np.ndarray:
        torch.manual_seed(seed)
        with torch.no_grad():
            return given(c).sample().numpy()

    return Flow(
        step,
        log_prob,
        sample,
        lambda: best.update({name: value.clone() for name, value in made.state_dict().items()}),
        lambda: made.load_state_dict(best),
    )


logging.getLogger("tarflow_jax").setLevel(logging.ERROR)
