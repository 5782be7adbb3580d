"""Whether a saved model is the one that it was saved from: a new process draws from it, and measures it again."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from launch import cli
from tarflow_jax.errors import UserError
from tarflow_jax.files import read_npz, write_npz
from tarflow_jax.pipeline import TarFlowPipeline

TOLERANCE, COUNT, LIMIT_S = 1e-4, 2, 120
LIKELIHOODS = {"bits_per_dim": "bits/dim", "log_prob": "log p, nats"}  # metrics and their figures


def draw(pipe: TarFlowPipeline) -> dict[str, np.ndarray]:
    """Draws a few images or sequences, float32 [B, …], and computes their log p, float32 [B]."""
    config, labels = pipe.config, cli.example_labels(pipe.config.num_classes, COUNT)
    condition = np.zeros((COUNT, *config.condition_shape), np.float32) if config.condition_dim else None
    drawn = pipe.sample(jax.random.key(0), COUNT, labels, denoise=False, condition=condition)
    log_prob = pipe.log_prob(drawn, labels, pipe.drawn_level, condition)
    return {"samples": np.asarray(drawn), "log_prob": np.asarray(log_prob)}


def write_drawn(folder: str, path: str) -> None:
    """Writes what `draw` returns of a model folder to an npz file; the new process calls it."""
    write_npz(path, **draw(TarFlowPipeline.from_pretrained(folder)))


def run_apart(*arguments: object, timeout: float | None = None, **variables: str) -> None:
    """Runs Python in an empty directory, with `variables` in its environment; UserError says why if it fails."""
    places = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as empty:
        try:
            done = subprocess.run(
                [sys.executable, *map(str, arguments)],
                cwd=empty,
                env=os.environ | {"PYTHONPATH": places} | variables,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired:
            raise UserError(f"it takes more than {timeout} s") from None
    if done.returncode:
        raise UserError((done.stderr.splitlines() or ["it was killed"])[-1].removeprefix("error: "))


def check_opened(pipe: TarFlowPipeline, folder: Path) -> None:
    """Raises UserError unless a new process opens the folder, and draws from it what `pipe` draws."""
    program = "import sys; from launch import reproduction; reproduction.write_drawn(*sys.argv[1:])"
    path, expected = folder.with_name("drawn.npz"), draw(pipe)
    try:
        run_apart("-c", program, folder, path, JAX_PLATFORMS="cpu")
    except UserError as error:
        raise UserError(f"a new process does not open the saved model ({error}); nothing was uploaded") from error
    found = read_npz(path, tuple(expected))
    for name, values in expected.items():
        if not np.allclose(found[name], values, rtol=TOLERANCE, atol=TOLERANCE):
            raise UserError(f"{name} of the saved model are not the model's, or not finite; nothing was uploaded")


def measure_again(folder: Path, evaluation: Mapping[str, Any]) -> None:
    """Measures the likelihoods of an evaluation again; raises UserError if one is another than its card will say."""
    protocol = evaluation["protocol"]
    for metric in LIKELIHOODS.keys() & evaluation["results"].keys():
        stated, unit = evaluation["results"][metric], LIKELIHOODS[metric]
        if unit not in stated:  # nats/dim of noisy data
            continue
        out = folder.with_name(metric)
        given = {
            "model": folder,
            "out": out,
            "metrics": metric,
            "dequantisation_draws": stated.get("dequantisation draws", 1),
            "data": protocol["data_set"],
            **{name: protocol[name] for name in ("preprocessing", "split", "seed")},
        }
        try:
            run_apart("-m", "launch.evaluate", *(f"--{name}={value}" for name, value in given.items()), timeout=LIMIT_S)
        except UserError as error:
            print(f"{unit}: not measured again ({error})")
            continue
        found = json.loads(next(out.glob("*.json")).read_text())["results"][metric][unit]
        if not np.isclose(found, stated[unit], rtol=TOLERANCE):
            raise UserError(f"{unit} is {found:.5g}, not {stated[unit]:.5g} as its card says; nothing was uploaded")
        print(f"{unit}: {found:.5g}, as on the card")
