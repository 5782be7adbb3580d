"""Makes models/two_moons: the posterior of the two moons simulator, a ready-made model of arrays.

    python -m benchmarks.two_moons [--num_steps 6000] [--seed 0] [--out models/two_moons]

The card has the log p of simulations held out, and C2ST at three observations (benchmarks/posteriors.py, which needs
`pip install flowjax zuko`).
"""

import argparse
import shlex
import sys
from pathlib import Path

import jax
import numpy as np

import tarflow_jax
from benchmarks import posteriors

NUM_SIMULATIONS = 200_000


def main() -> None:
    """Simulates, fits, measures, saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_steps", type=int, default=6000, help="of the fit")
    parser.add_argument("--seed", type=int, default=0, help="of simulations and fit")
    parser.add_argument("--out", type=Path, default=Path("models/two_moons"), help="folder of the model")
    args = parser.parse_args()
    task, rng = posteriors.TASKS["two_moons"], np.random.default_rng(args.seed)
    parameters = task.prior(rng, NUM_SIMULATIONS)
    flow = tarflow_jax.fit(
        parameters,
        condition=task.simulate(rng, parameters),
        num_steps=args.num_steps,
        batch_size=1024,
        key=jax.random.key(args.seed),
        validation=0.05,
        weight_decay=0.03,
        num_blocks=8,
    )
    metrics = dict(flow.card["metrics"])
    for number, (observed, reference) in enumerate(posteriors.references(task)):
        condition = np.repeat(observed[None], len(reference), 0)
        drawn = flow.sample(jax.random.key(number), len(reference), condition=condition)
        metrics[f"C2ST at observation {np.round(observed, 2)}"] = posteriors.c2st(reference, np.asarray(drawn))
    training = flow.card["training"] | {
        "seed": args.seed,
        "simulations": NUM_SIMULATIONS,
        "command": shlex.join(["python", "-m", "benchmarks.two_moons", *sys.argv[1:]]),
        "parameters": "two, uniform in [-1, 1], given two observed numbers (arXiv 2101.04653)",
    }
    card = {"name": "two_moons", "datasets": ["two_moons"], "training": training, "metrics": metrics}
    flow.save_pretrained(args.out, card=card)


if __name__ == "__main__":
    main()
