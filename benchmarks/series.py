"""Time series of varying length from a known process: nats by which `tarflow_jax.fit` stays above the entropy.

    python -m benchmarks.series [--num_steps 2000] [--seeds 3] [--rows FILE.jsonl]

x_t = A x_{t-1} + B ε_t in two dimensions, stationary, 5 to 30 steps. A row has the mean of log p - log q over 5,000
fresh series, for all of them and by quarters of the lengths, with standard errors.
"""

import argparse
import json
import time
from pathlib import Path

import jax
import numpy as np
from scipy.linalg import solve_discrete_lyapunov

import tarflow_jax
from benchmarks.common import json_lines

MAX_LENGTH, MIN_LENGTH = 30, 5
DECAY = np.array([[0.9, -0.3], [0.2, 0.8]])
NOISE = np.array([[0.3, 0.0], [0.1, 0.2]])
STATIONARY = np.linalg.cholesky(solve_discrete_lyapunov(DECAY, NOISE @ NOISE.T))


def draw(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Series [count, T, 2] and their lengths [count]; what stands behind a series is not its process."""
    noise = rng.normal(size=(MAX_LENGTH, count, 2))
    series = [noise[0] @ STATIONARY.T]
    for step in noise[1:]:
        series.append(series[-1] @ DECAY.T + step @ NOISE.T)
    lengths = rng.integers(MIN_LENGTH, MAX_LENGTH + 1, count)
    x = np.stack(series, axis=1)
    x[np.arange(MAX_LENGTH) >= lengths[:, None]] = 1e3
    return x, lengths


def normal_log_prob(x: np.ndarray, root: np.ndarray) -> np.ndarray:
    """log N(x; 0, root rootᵀ), over the last axis."""
    white = np.linalg.solve(root, x[..., None])[..., 0]
    return -0.5 * np.square(white).sum(-1) - np.log(np.diag(root)).sum() - np.log(2 * np.pi)


def true_log_prob(x: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """log p of series, [count] nats."""
    steps = normal_log_prob(x[:, 1:] - x[:, :-1] @ DECAY.T, NOISE)
    exist = np.arange(1, MAX_LENGTH) < lengths[:, None]
    return normal_log_prob(x[:, 0], STATIONARY) + np.where(exist, steps, 0).sum(1)


def measure(num_steps: int, seed: int) -> dict[str, object]:
    """A row."""
    rng = np.random.default_rng(seed)
    x, lengths = draw(rng, 20_000)
    start = time.perf_counter()
    flow = tarflow_jax.fit(x, mask=lengths, num_steps=num_steps, key=jax.random.key(seed))
    seconds = time.perf_counter() - start
    x, lengths = draw(rng, 5000)
    excess = true_log_prob(x, lengths) - np.asarray(flow.log_prob(x.astype(np.float32), mask=lengths))
    parts = [excess[part] for part in np.array_split(np.argsort(lengths, kind="stable"), 4)]
    return {
        "nats": round(float(excess.mean()), 4),
        "standard_error": round(float(excess.std() / np.sqrt(len(excess))), 4),
        "nats_by_length": [round(float(part.mean()), 4) for part in parts],
        "mean_length": round(float(lengths.mean()), 2),
        "seconds": round(seconds, 1),
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    """Appends the missing rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_steps", type=int, default=2000, help="of a fit")
    parser.add_argument("--seeds", type=int, default=3, help="fits")
    parser.add_argument("--rows", type=Path, default=Path("docs/results/series.jsonl"), help="file to append to")
    args = parser.parse_args()
    done = json_lines(args.rows)
    for seed in range(args.seeds):
        asked = {"seed": seed, "num_steps": args.num_steps}
        if not any(asked.items() <= row.items() for row in done):
            line = json.dumps(asked | measure(args.num_steps, seed))
            print(line, flush=True)
            with args.rows.open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
