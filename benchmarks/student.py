"""Times an image: the exact inverse denoised with the score, against one pass of a student.

    python -m benchmarks.student [--patch_size=2] [--batches 1 100] [--json FILE]
    python -m benchmarks.student --model=runs/fashion_mnist [--seed=0] [--json FILE]

Shapes are those of configs/fashion_mnist.py and configs/student/fashion_mnist.py. Weights are untrained, which does not
change the arithmetic. A patch size of 2 gives 196 tokens instead of 49. Runs alternate in one process.

With --model, compares a trained student's images with its flow's instead, for the same latents and without guidance.
"""

import argparse
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from configs import fashion_mnist
from configs.defaults import with_flow
from configs.student import fashion_mnist as student_of_fashion
from launch.cli import example_labels, format_table
from tarflow_jax import Guidance, TarFlow, TarFlowPipeline
from tarflow_jax.fingerprint import fingerprint
from tarflow_jax.sampling import Jacobi
from tarflow_jax.sampling import Student as StudentDecoder
from tarflow_jax.student import Student, TrainedStudent
from tarflow_jax.training import Recipe

GUIDANCE = Guidance(0.7)
NUM_LATENTS, JACOBI_LATENTS, POLISHES = 1000, 100, (1, 2, 4)


def new_pipeline(patch_size: int) -> TarFlowPipeline:
    """A flow and its student with the weights they have before training."""
    flow = fashion_mnist.get_config()
    flow.model.patch_size = patch_size
    recipe = Recipe(with_flow(student_of_fashion.get_config(), flow))
    model = dataclasses.replace(recipe.model, remat="none")
    assert recipe.student is not None
    student = dataclasses.replace(recipe.student, flow=dataclasses.replace(recipe.student.flow, remat="none"))
    image = jnp.zeros((1, *model.image_shape))
    variables = {"params": TarFlow(model).init(jax.random.key(0), image)["params"]}
    of_student = Student(student).init(jax.random.key(0), image)
    counts = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (of_student, variables)]
    print(f"{model.num_tokens} tokens; the student has {counts[0] / counts[1]:.2f} times the flow's parameters")
    trained = TrainedStudent(student, {"params": of_student["params"]}, fingerprint(variables))
    return TarFlowPipeline(model, variables, recipe.noise, student=trained)


def works(pipe: TarFlowPipeline, batch: int, guidance: Guidance | None) -> dict[str, common.Run]:
    """What is timed, by name."""
    latents = np.random.default_rng(0).standard_normal((batch, *pipe.config.image_shape), np.float32)
    labels = np.arange(batch) % pipe.config.num_classes
    return {
        "exact, denoised": lambda: pipe.denoise_samples(pipe.decode(latents, labels, guidance), labels),
        "student": lambda: pipe.decode(latents, labels, guidance, decoder=StudentDecoder()),
    }


def timings(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds for each batch size, guided and not."""
    pipe, results = new_pipeline(args.patch_size), {}
    for batch in args.batches:
        for guidance in (None, GUIDANCE):
            name = f"{batch} images, {pipe.config.num_tokens} tokens, {'guided' if guidance else 'unguided'}"
            results[name] = common.time_in_turns(works(pipe, batch, guidance), args.repeats)
            print(common.table(name, results[name], batch, "exact, denoised"))
    return results


def verdict(pipe: TarFlowPipeline, seed: int) -> dict[str, Any]:
    """The flow's verdict on its student: a row for each way to decode, and the updates of Jacobi decoding."""
    key, level = jax.random.key(seed), pipe.sampling_noise_std
    latents, labels = pipe.latents(key, NUM_LATENTS), example_labels(pipe.config.num_classes, NUM_LATENTS)

    def decode(decoder: Any = None) -> jax.Array:
        return pipe.decode(latents, labels, decoder=decoder, noise_std=level)

    noisy = {"exact": decode()} | {f"student, polish {polish}": decode(StudentDecoder(polish)) for polish in POLISHES}
    clean = {} if pipe.noise_std is None else {"exact, denoised": pipe.denoise_samples(noisy["exact"], labels)}
    clean["student"] = pipe.decode(latents, labels, decoder=StudentDecoder())
    target, target_images = next(iter(clean.items()))
    rows = []
    for name, images in (noisy | clean).items():
        errors = np.abs(np.asarray(pipe.encode(images, labels, level)[0]) - np.asarray(latents))
        with_noise = images
        if name in clean and pipe.noise_std is not None:
            with_noise = images + pipe.noise_std * jax.random.normal(jax.random.fold_in(key, 1), images.shape)
        row = {
            "images": name,
            "latents off by (root mean square)": float(np.sqrt(np.square(errors).mean())),
            "at most": float(errors.max()),
            "nats/dim": nats_per_dim(pipe, images, labels),
            "nats/dim with noise": nats_per_dim(pipe, with_noise, labels),
            f"correlation with {target}": correlation(images, target_images),
        }
        rows.append(row)
    few = None if labels is None else labels[:JACOBI_LATENTS]
    updates = {}
    for init in ("latents", "student"):
        trace = pipe.decode_trace(latents[:JACOBI_LATENTS], few, None, Jacobi(init=init), level)
        updates[f"Jacobi from the {init}"] = np.asarray(trace.updates).mean(0).tolist()
    return {"rows": rows, "latents": NUM_LATENTS, "updates by block": updates}


def nats_per_dim(pipe: TarFlowPipeline, images: jax.Array, labels: np.ndarray | None) -> float:
    """Mean of -log p of images."""
    log_prob = np.asarray(pipe.log_prob(images, labels, pipe.sampling_noise_std), np.float64)
    return float(-log_prob.mean() / pipe.config.num_dims)


def correlation(images: jax.Array, others: jax.Array) -> float:
    """Correlation of the pixels, after subtracting the mean of `others`."""
    first, second = (np.asarray(x, np.float64) - np.asarray(others, np.float64).mean(0) for x in (images, others))
    return float((first * second).sum() / np.sqrt(np.square(first).sum() * np.square(second).sum()))


def main() -> None:
    """Measures and prints."""
    args = common.parse(
        __doc__,
        patch_size={"type": int, "default": 4, "help": "of the flow and its student"},
        batches={"type": int, "nargs": "+", "default": [1, 100], "help": "images drawn together"},
        model={"help": "run directory, or saved model's folder, whose trained student is compared instead"},
        seed={"type": int, "default": 0, "help": "of the latents, with --model"},
    )
    if args.model:
        results = verdict(TarFlowPipeline.from_pretrained(args.model), args.seed)
        print(format_table(results["rows"]), results["updates by block"], sep="\n")
    else:
        results = timings(args)
    if args.json:
        common.write_json(args.json, results)


if __name__ == "__main__":
    main()
