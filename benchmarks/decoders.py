"""Compares decoders of a trained model: time, updates, error, and distance of their samples."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib import pyplot

from benchmarks import common, rivals
from launch.cli import DECODERS, example_labels
from tarflow_jax import Guidance, TarFlowPipeline
from tarflow_jax.data import open_source
from tarflow_jax.evaluation.classifier import classifier_network
from tarflow_jax.evaluation.scores import FeatureStatistics, feature_statistics, frechet_distance
from tarflow_jax.figures import to_uint8
from tarflow_jax.flow import Conditioning, FlowBlock, block_orders, permute, to_tokens
from tarflow_jax.sampling import Jacobi, Sequential
from tarflow_jax.training import Recipe

NUM_FRECHET = 2000
LARGEST_EXACT = 16  # images that tolerance 0 is tried on: it takes T - 1 updates


def compare(args: argparse.Namespace) -> None:
    """Prints a table for each batch size, and writes the figures."""
    pipe = TarFlowPipeline.from_pretrained(args.workdir)
    reference = rivals.Reference(args.reference, pipe.config) if args.reference else None
    guidance = Guidance(args.guidance)
    results, rows = {}, []
    for batch in args.batches:
        latents = pipe.latents(jax.random.key(1), batch)
        labels = example_labels(pipe.config.num_classes, batch)
        runs: dict[str, common.Run] = {
            name: lambda decoder=decoder, z=latents, y=labels: pipe.decode(z, y, guidance, decoder=decoder)
            for name, decoder in DECODERS.items()
        }
        if reference:
            runs["reference"] = reference.sampling(
                np.asarray(latents), np.arange(batch) % max(pipe.config.num_classes, 1), args.guidance
            )
        figures = common.time_in_turns(runs, args.repeats)
        exact = pipe.decode(latents, labels, guidance)
        for name, decoder in DECODERS.items():
            images, _, _, updates, _ = pipe.decode_trace(latents, labels, guidance, decoder)
            figures[name]["updates"] = [round(float(block.mean()), 1) for block in updates.T]
            figures[name]["error"] = float(abs(images - exact).max())
            rows.append(_row(name, batch, figures))
        if batch <= LARGEST_EXACT:
            error = float(abs(pipe.decode(latents, labels, guidance, decoder=Jacobi(tolerance=0)) - exact).max())
            figures["jacobi, tolerance 0"] = {"error": error}
            rows.append(f"{batch:4} images  jacobi, tolerance 0: error {error:.1e}")
        results[f"{batch} images"] = figures
    print("\n".join(rows))
    if args.frechet:
        results["frechet"] = _distances(pipe, args.workdir, guidance)
        print(f"Fréchet distance (classifier features) of {NUM_FRECHET:,} samples to the sequential ones'")
        print("\n".join(f"  {name:19} {distance:.2g}" for name, distance in results["frechet"].items()))
    if args.figure:
        plot_convergence(pipe, Path(args.figure))
    if args.json:
        common.write_json(args.json, results)


def plot_convergence(pipe: TarFlowPipeline, path: Path, count: int = 16) -> None:
    """Draws the largest error of a block's tokens after each Jacobi update, from its input ("latents")."""
    labels = example_labels(pipe.config.num_classes, count)
    trajectory = pipe.decode_trace(pipe.latents(jax.random.key(1), count), labels).trajectory
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for k in range(pipe.config.num_blocks):
        order = block_orders(pipe.config, pipe.variables)[k][None]
        z, x = (
            permute(to_tokens(pipe.config, trajectory[:, pipe.config.num_blocks - 1 - k + i]), order) for i in (0, 1)
        )
        errors = _errors(FlowBlock(pipe.config, k), pipe.variables["params"][f"block_{k}"], order, labels, z, x)
        axes.semilogy(errors, label=f"block {k}")
    axes.axhline(1 / 255, color="grey", linewidth=0.8, linestyle="--")
    axes.set(xlabel="updates", ylabel="largest error, [-1, 1] units", ylim=(1e-7, None))
    axes.legend()
    figure.savefig(path, dpi=120)


def _errors(
    block: FlowBlock, params: dict, order: Any, labels: np.ndarray | None, z: jax.Array, exact: jax.Array
) -> list[float]:
    @jax.jit
    def update(x: jax.Array) -> jax.Array:
        affine = block.apply({"params": params}, x, order, Conditioning(labels), method="predict")[0]
        return affine.shift_right().inverse(z)

    x, errors = z, [float(abs(z - exact).max())]
    for _ in range(z.shape[1] - 1):
        x = update(x)
        errors.append(float(abs(x - exact).max()))
    return errors


def _row(name: str, batch: int, figures: dict) -> str:
    row = figures[name]
    ratio = figures["sequential"]["median_s"] / row["median_s"]
    line = f"{batch:4} images  {name:19} {row['median_s']:8.4f} s  {ratio:6.2f} x sequential"
    if "reference" in figures:
        line += f"  {figures['reference']['median_s'] / row['median_s']:6.2f} x reference"
    return f"{line}  error {row['error']:.1e}  updates {row['updates']}"


def _distances(pipe: TarFlowPipeline, workdir: str, guidance: Guidance) -> dict[str, float]:
    """Of each decoder's samples to the sequential ones', from other latents as well: what chance alone makes."""
    fields = Recipe.from_workdir(Path(workdir)).config.data
    train, test = (open_source(fields.source, split) for split in ("train", "test"))
    with tempfile.TemporaryDirectory() as cache:
        network = classifier_network(train, test, cache)

    def statistics(decoder: object, seed: int) -> FeatureStatistics:
        latents = pipe.latents(jax.random.key(seed), NUM_FRECHET)
        labels = example_labels(pipe.config.num_classes, NUM_FRECHET)
        images = to_uint8(pipe.decode(latents, labels, guidance, decoder=decoder))
        return feature_statistics(network(images).pooled)

    sequential = statistics(Sequential(), 0)
    found = {
        name: frechet_distance(statistics(decoder, 0), sequential)
        for name, decoder in DECODERS.items()
        if name != "sequential"
    }
    return found | {"other seed": frechet_distance(statistics(Sequential(), 2), sequential)}
