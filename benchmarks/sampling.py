"""Sampling and denoising speed: ours, the reference's and a peer's, alternating in one process.

    python -m benchmarks.sampling --shape=fashion_mnist --reference=../ml-tarflow [--peer=transformer-flows]

For each batch size: seconds to sample without and with guidance (by class, or by attention temperature if there are no
classes), and to denoise. Weights are untrained, which does not change the arithmetic.

    python -m benchmarks.sampling --decoders --workdir=DIR --batches 1 16 100 --reference=../ml-tarflow --frechet

Compares decoders of a trained model.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common, decoders, rivals
from tarflow_jax import Guidance, Noise, TarFlow, TarFlowConfig, TarFlowPipeline

NOISE_STD = 0.1
WEIGHT = 1.5


def new_pipeline(config: TarFlowConfig) -> TarFlowPipeline:
    """A model with the weights it has before training."""
    variables = TarFlow(config).init(jax.random.key(0), jnp.zeros((1, *config.image_shape)))
    return TarFlowPipeline(config, {"params": variables["params"]}, Noise("gaussian", NOISE_STD))


def works(args: argparse.Namespace, config: TarFlowConfig, batch: int) -> dict[str, dict[str, common.Run]]:
    """What is timed, by name, and who does it, by name."""
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((batch, *config.image_shape), np.float32)
    labels = np.arange(batch) % max(config.num_classes, 1)
    pipe, ours = new_pipeline(config), labels if config.num_classes else None
    guidance = Guidance(WEIGHT, attention_temperature=1.0 if config.num_classes else 0.5)
    names = ("sampling", "guided sampling", "denoising")
    works: dict[str, dict[str, common.Run]] = {f"{name}, {batch} images": {} for name in names}
    plain, guided, denoising = works.values()
    plain["tarflow_jax"] = lambda: pipe.decode(latents, ours)
    guided["tarflow_jax"] = lambda: pipe.decode(latents, ours, guidance)
    denoising["tarflow_jax"] = lambda: pipe.denoise(latents, ours)
    if args.reference:
        reference = rivals.Reference(args.reference, config)
        plain["reference"] = reference.sampling(latents, labels, 0)
        guided["reference"] = reference.sampling(latents, labels, WEIGHT)
        denoising["reference"] = reference.denoising(latents, labels, NOISE_STD)
    if args.peer:
        plain[args.peer] = rivals.Peer(config).sampling(latents)
    return works


def main() -> None:
    """Measures and prints."""
    batches = {"type": int, "nargs": "+", "default": [100, 1], "help": "images drawn together"}
    flag = {"action": "store_true"}
    args = common.parse(
        __doc__,
        batches=batches,
        decoders=flag | {"help": "compare the decoders of a trained model"},
        workdir={"help": "its folder"},
        guidance={"type": float, "default": 0.0, "help": "weight that the decoders are compared at"},
        figure={"metavar": "PNG", "help": "where to draw error against updates"},
        frechet=flag | {"help": "also the distance of their samples"},
    )
    if args.decoders:
        decoders.compare(args)
        return
    config = common.shape(args, remat="none").model
    results = {}
    for batch in args.batches:
        for name, runs in works(args, config, batch).items():
            results[name] = common.time_in_turns(runs, args.repeats)
            print(common.table(f"{name}, {args.shape}, {config.dtype}", results[name], batch, "reference"))
    if args.json:
        common.write_json(args.json, results)


if __name__ == "__main__":
    main()
