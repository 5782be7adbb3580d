"""Base configs of recipes, with every option's default, and variants that several recipes share."""

from collections.abc import Callable

from ml_collections import ConfigDict

from tarflow_jax.errors import UserError
from tarflow_jax.training.recipe import AUTOENCODER_GROUPS, STUDENT_GROUPS, default_config

PAPER_OPTIMIZER = {"name": "adamw", "muon_learning_rate": 0.0, "learning_rate": 1e-4, "clip_norm": 0.0}


def get_config() -> ConfigDict:
    """Returns a recipe that lacks a model's shape, a data set and a number of steps."""
    config = default_config()
    config.noise.std = 0.05
    return config


def student_config() -> ConfigDict:
    """Returns a student's recipe that lacks a number of steps; `with_flow` adds its flow's model, data and noise."""
    config = default_config(STUDENT_GROUPS)
    config.student.flow = ""  # fingerprint of the flow's weights; launch.distill fills it in
    config.train.drop_label = 0.1
    return config


def autoencoder_config() -> ConfigDict:
    """Returns an autoencoder's recipe that lacks its shape, a data set and a number of steps."""
    config = default_config(AUTOENCODER_GROUPS)
    config.decoder_of = ""  # folder of an autoencoder, to train only its decoder
    config.optimizer.update({"name": "adamw", "muon_learning_rate": 0.0})
    return config


def with_flow(config: ConfigDict, flow: ConfigDict) -> ConfigDict:
    """Returns a student's recipe with its flow's model, data and noise."""
    if "student" not in config:
        raise UserError("--config is no student's recipe; expected one such as configs/student/digits.py")
    whole = ConfigDict({name: flow[name] for name in ("model", "data", "noise")})
    whole.update(config)
    return whole


def likelihood(config: ConfigDict) -> ConfigDict:
    """Applies the variant for bits per dimension: uniform dequantisation, no labels, float32."""
    config.noise.update({"kind": "uniform", "std": 0.0})
    config.model.update({"num_classes": 0, "dtype": "float32"})
    config.model.image_limit = min(config.model.image_limit, 1.0)  # uniform noise stays within
    config.train.drop_label = 0.0
    config.sample.guidance.update({"weight": 0.3, "attention_temperature": 0.5})
    return config


def smoke(config: ConfigDict) -> ConfigDict:
    """Applies the variant that runs in seconds: the recipe's code with a tiny model and few steps."""
    with config.model.ignore_type():  # the recipe may have a depth for each block
        config.model.update({"width": 64, "num_blocks": 2, "layers_per_block": 1})
    config.train.update(
        {
            "num_steps": 20,
            "batch_size": 16,
            "accumulation": 1,
            "checkpoint_every": 10,
            "sample_every": 10,
            "log_every": 5,
        }
    )
    config.optimizer.warmup_steps = 5
    return config


def student_smoke(config: ConfigDict) -> ConfigDict:
    """Applies a student's variant that runs in seconds."""
    config.student.update({"layers_per_block": (1,), "perceptual": 0.0})
    config.train.update({"num_steps": 20, "batch_size": 16, "checkpoint_every": 10, "log_every": 5})
    config.optimizer.warmup_steps = 5
    return config


def autoencoder_smoke(config: ConfigDict) -> ConfigDict:
    """Applies an autoencoder's variant that runs in seconds."""
    config.reconstruction.perceptual = 0.0
    config.train.update({"num_steps": 20, "batch_size": 16, "checkpoint_every": 10, "sample_every": 10, "log_every": 5})
    config.optimizer.warmup_steps = 5
    return config


def tuned(config: ConfigDict) -> ConfigDict:
    """Applies the settings that helped in docs/lab/optimizers.md; unmeasured at the paper's sizes."""
    config.model.update(
        {
            "position_init": "grid",
            "rotary": True,
            "input_limit": 10.0,
            "image_limit": 1.0 + 5.0 * config.noise.std,
            "triangular": config.model.patch_size <= 4,  # its outputs grow as the fourth power of the patch size
        }
    )
    rate = 5e-3 * 128 / config.model.width  # so falls the best rate from width 64 to 256
    config.optimizer.update({"name": "muon", "muon_learning_rate": rate, "learning_rate": 1e-3, "clip_norm": 1.0})
    return config


def levels(config: ConfigDict) -> ConfigDict:
    """Turns a recipe for one noise level into one for all, with the draw that helped in docs/lab/noise_levels.md."""
    config.model.update({"noise_conditional": True, "image_limit": 2.5})
    config.noise.update({"kind": "levels", "std": 0.0, "std_min": 0.01, "std_max": 0.3, "draw": "variance"})
    return config


def with_variant(config: ConfigDict, variant: str, *known: Callable[[ConfigDict], ConfigDict]) -> ConfigDict:
    """Applies the variant of this name, "" for none; raises ValueError if it is not among the `known` ones.

    By default, these are `likelihood` and `smoke`.
    """
    variants = {function.__name__.rpartition("_")[2]: function for function in known or (likelihood, smoke)}
    if not variant:
        return config
    if variant not in variants:
        raise UserError(f"unknown variant {variant!r}; expected {', '.join(variants)}")
    return variants[variant](config)
