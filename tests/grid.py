"""Models and methods that test_grid.py runs under every transformation of JAX.

`PYTHONPATH=. python tests/grid.py` writes the table of docs/api/transformations.md.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tarflow_jax import Guidance, IterativeDenoising, Noise, TarFlowConfig, TarFlowPipeline
from tarflow_jax.fingerprint import fingerprint
from tarflow_jax.runtime.parameters import student_shapes
from tarflow_jax.sampling import StudentDecoder
from tarflow_jax.student import StudentConfig, TrainedStudent
from tiny_models import random_variables

TABLE = Path(__file__).parents[1] / "docs" / "api" / "transformations.md"
BATCH = 4
IMAGES = TarFlowConfig((2, 6), 1, 2, 8, 1, 1, head_dim=4)
SEQUENCES = TarFlowConfig(sequence_shape=(3, 4), width=8, num_blocks=1, layers_per_block=1, head_dim=4)
GAUSSIAN, LEVELS = Noise("gaussian", 0.1), Noise("levels", std_min=0.05, std_max=0.4)
LABELS = np.array([0, -1, 2, 1], np.int32)


@dataclasses.dataclass(frozen=True)
class Model:
    """A model, the kinds that it stands for, and what its methods are called with.

    Attributes:
      kinds: columns of the table.
      fields: of the config, which is otherwise `IMAGES`, or `SEQUENCES` if the noise is None.
      noise: of the training.
      keywords: that every method takes: labels, condition, mask.
      guidance: of decode and sample.
      decoder: of decode and sample.
      null_condition: replaces that of the parameters.
    """

    kinds: tuple[str, ...]
    fields: Mapping[str, Any]
    noise: Noise | None = GAUSSIAN
    keywords: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    guidance: Guidance | None = None
    decoder: Any = None
    null_condition: float = 0.0

    @property
    def config(self) -> TarFlowConfig:
        return dataclasses.replace(SEQUENCES if self.noise is None else IMAGES, **self.fields)


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(BATCH, *shape)).astype(np.float32)


LABELS = {"labels": np.array([0, -1, 2, 1], np.int32)}
CLASSES = {"num_classes": 3}
MODELS = (
    Model(("classes",), CLASSES, keywords=LABELS, guidance=Guidance(1.0)),
    Model(("noise levels", "start token"), {**CLASSES, "noise_conditional": True, "start_token": True}, LEVELS, LABELS),
    Model(
        ("VP", "random orders"), {"volume_preserving": True, "orders": "random"},
        guidance=Guidance(0.5, attention_temperature=2.0),
    ),
    Model(
        ("masks", "vector condition with drop_condition"), {"condition_dim": 2}, None,
        {"mask": np.array([3, 2, 1, 3]), "condition": numbers(2)}, Guidance(1.0), null_condition=0.3,
    ),
    Model(("vector condition",), {"condition_dim": 2}, None, {"condition": numbers(2)}),
    Model(("token condition",), {"condition_dim": 2, "condition_kind": "tokens"}, None, {"condition": numbers(3, 2)}),
    Model(
        ("prefix", "triangular"),
        {"condition_dim": 2, "condition_kind": "prefix", "condition_length": 2, "rotary": True, "triangular": True},
        keywords={"condition": numbers(2, 2)}, guidance=Guidance(1.0),
    ),
    Model(("student",), CLASSES, keywords=LABELS, guidance=Guidance(0.5), decoder=StudentDecoder()),
    Model(("bfloat16",), {**CLASSES, "dtype": "bfloat16"}, keywords=LABELS),
)  # fmt: skip


def make_pipe(model: Model, seed: int = 0, **options: Any) -> TarFlowPipeline:
    """A pipeline with random weights."""
    variables = random_variables(model.config, seed)
    for block in variables["params"].values():
        if "null_condition" in block:
            block["null_condition"] = jnp.full_like(block["null_condition"], model.null_condition)
    student = (
        make_student(model.config, seed, fingerprint(variables)) if isinstance(model.decoder, StudentDecoder) else None
    )
    return TarFlowPipeline(model.config, variables, model.noise, student=student, **options)


def make_student(config: TarFlowConfig, seed: int, flow: str) -> TrainedStudent:
    student, rng = StudentConfig(config, layers_per_block=(1,), max_guidance=2.0), np.random.default_rng(seed)
    tree: dict[str, Any] = {"params": {}}
    for name, shape in student_shapes(student).items():
        *path, last = name.split("/")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = jnp.asarray(rng.normal(0, 0.2, shape).astype(np.float32))
    return TrainedStudent(student, tree, flow)


def decoding(model: Model) -> dict[str, Any]:
    return {**model.keywords, "guidance": model.guidance, "decoder": model.decoder}


def at_level(model: Model) -> dict[str, Any]:
    return {"noise_std": 0.2} if model.config.noise_conditional else {}


def pixels(model: Model) -> np.ndarray:
    return np.random.default_rng(2).integers(0, 256, (BATCH, *model.config.data_shape), np.uint8)


def without(model: Model, *names: str) -> dict[str, Any]:
    return {name: value for name, value in model.keywords.items() if name not in names}


KEY = jax.random.key(3)
# x [B, …] is what the method gets, if it gets arrays of floats.
METHODS: dict[str, Callable[[TarFlowPipeline, Model, Any], Any]] = {
    "encode": lambda pipe, model, x: pipe.encode(x, **model.keywords, **at_level(model)),
    "log_prob": lambda pipe, model, x: pipe.log_prob(x, **model.keywords, **at_level(model)),
    "patch_log_prob": lambda pipe, model, x: pipe.patch_log_prob(x, **without(model, "mask"), **at_level(model)),
    "bits_per_dim": lambda pipe, model, x: pipe.bits_per_dim(
        KEY, pixels(model), **without(model, "mask"), **at_level(model)
    ),
    "decode": lambda pipe, model, x: pipe.decode(x, **decoding(model), **at_level(model)),
    "decode_trace": lambda pipe, model, x: pipe.decode_trace(x, **decoding(model), **at_level(model)),
    "sample": lambda pipe, model, x: pipe.sample(KEY, BATCH, **decoding(model)),
    "sample with log q": lambda pipe, model, x: pipe.sample(
        KEY, BATCH, **decoding(model), denoise=False, return_log_prob=True
    ),
    "denoise": lambda pipe, model, x: pipe.denoise(x, **model.keywords, noise_std=0.2),
    "denoise in steps": lambda pipe, model, x: pipe.denoise(
        x, **model.keywords, noise_std=0.2, method=IterativeDenoising(2)
    ),
}


def refused(model: Model, method: str) -> str | None:
    """Why a model does not have a method, in the words of its error; None if it has."""
    if model.config.is_sequence and method in ("patch_log_prob", "bits_per_dim"):
        return f"{method} is of images, and this model of sequences; use log_prob"
    if method == "denoise in steps" and not model.config.noise_conditional:
        return "iterative denoising needs a model of many noise levels; this one is of a single level"
    if method == "sample with log q" and isinstance(model.decoder, StudentDecoder):
        return "return_log_prob=True requires denoise=False and an exact decoder"
    return None


def page() -> str:
    """The page of docs/api that says what works."""
    columns = {kind: model for model in MODELS for kind in model.kinds}
    reasons: list[str] = []
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for method in METHODS:
        cells = []
        for model in columns.values():
            reason = refused(model, method)
            if reason is not None and reason not in reasons:
                reasons.append(reason)
            cells.append("✓" if reason is None else f"({reasons.index(reason) + 1})")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    notes = [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    return "\n".join([HEADER, *lines, "", "The method raises ValueError in every transformation:", "", *notes, ""])


HEADER = """# What works where

Each method of a pipeline, for each kind of model, gives the same result eagerly, under `jax.jit`, `jax.grad`,
`jax.vmap`, `jax.jvp` and `jax.disable_jit`, on a mesh of four devices, and with the pipeline as an argument of the
transformed function. `tests/test_grid.py` checks each cell of this table, which `tests/grid.py` writes; under
`jax.disable_jit`, one cell of each row and of each column.
"""

if __name__ == "__main__":
    TABLE.write_text(page())
