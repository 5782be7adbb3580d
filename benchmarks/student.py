"""Times an image: the exact inverse denoised with the score, against one pass of a student.

    python -m benchmarks.student [--patch_size=2] [--batches 1 100] [--json FILE]

Shapes are those of configs/fashion_mnist.py and configs/student/fashion_mnist.py. Weights are untrained, which does not
change the arithmetic. A patch size of 2 gives 196 tokens instead of 49. Runs alternate in one process.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from configs import fashion_mnist
from configs.defaults import with_flow
from configs.student import fashion_mnist as student_of_fashion
from tarflow_jax import Guidance, TarFlow, TarFlowPipeline
from tarflow_jax.fingerprint import fingerprint
from tarflow_jax.sampling import Student as StudentDecoder
from tarflow_jax.student import Student, TrainedStudent
from tarflow_jax.training import Recipe

GUIDANCE = Guidance(0.7)


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
        "exact, denoised": lambda: pipe.denoise_drawn(pipe.decode(latents, labels, guidance), labels),
        "student": lambda: pipe.decode(latents, labels, guidance, decoder=StudentDecoder()),
    }


def main() -> None:
    """Measures and prints."""
    args = common.parse(
        __doc__,
        patch_size={"type": int, "default": 4, "help": "of the flow and its student"},
        batches={"type": int, "nargs": "+", "default": [1, 100], "help": "images drawn together"},
    )
    pipe, results = new_pipeline(args.patch_size), {}
    for batch in args.batches:
        for guidance in (None, GUIDANCE):
            name = f"{batch} images, {pipe.config.num_tokens} tokens, {'guided' if guidance else 'unguided'}"
            results[name] = common.time_in_turns(works(pipe, batch, guidance), args.repeats)
            print(common.table(name, results[name], batch, "exact, denoised"))
    if args.json:
        common.write_json(args.json, results)


if __name__ == "__main__":
    main()
