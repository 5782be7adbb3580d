"""The fields that every recipe shares, with their defaults: the optimizer that learns most (docs/optimizers.md)."""

from collections.abc import Callable

from ml_collections import ConfigDict

from tarflow_jax.errors import UserError

PAPER_OPTIMIZER = {"name": "adamw", "muon_learning_rate": 0.0, "learning_rate": 1e-4, "clip_norm": 0.0}

# One table, whose comments `--helpfull` prints beside the fields (launch/help.py reads them off this file).
FIELDS = {
    "model": {
        "image_size": (0, 0),  # height, width
        "image_channels": 0,
        "patch_size": 0,
        "width": 0,
        "num_blocks": 0,
        "layers_per_block": 0,
        "num_classes": 0,  # 0: unconditional
        "volume_preserving": False,
        "dtype": "float32",  # of matrix products; or bfloat16
        "remat": "none",  # what the backward pass recomputes; or dots, attention, full
        "attention": "auto",  # kernel for whole sequences; or plain, cudnn, splash
        "rotary": False,  # position embeddings in attention, by row and column
        "input_limit": 0.0,  # of what blocks read, for small batches; 0: none
        "image_limit": 0.0,  # of what the first block reads: the images' range and some noise; 0: none
        "noise_conditional": False,  # one flow for all noise levels
        "triangular": False,  # affine maps with triangular matrices instead of diagonal ones
        "position_init": "normal",  # of the position embeddings; or grid, which learns sooner
    },
    "data": {
        "source": "",  # digits, fashion_mnist, tfds:NAME, folder:PATH, npz:FILE
        "data_dir": "",  # where sets are kept; "" is the default folder
        "preprocessing": "none",  # or tarflow, adm
        "flip": False,  # mirror at random
        "num_workers": 0,  # threads that read ahead
        "skip_bad": False,  # leave out a folder's damaged images instead of refusing it
        "missing_labels": False,  # let the source have fewer classes than a class-conditional model, or none
        "cache_bytes": 0,  # keep decoded images in memory up to this size
    },
    "noise": {
        "kind": "gaussian",  # or uniform, levels
        "std": 0.05,
        "std_min": 0.0,  # of levels
        "std_max": 0.0,
        "draw": "uniform",  # of a level, in σ; or variance, lognormal
        "weight": "std",  # of an image in the loss, its σ; or one
    },
    "optimizer": {
        "name": "muon",  # for the hidden matrices, the rest by AdamW; or adamw for all
        "learning_rate": 3e-3,
        "muon_learning_rate": 5e-3,  # of the hidden matrices; with adamw 0
        "final_learning_rate": 1e-6,
        "warmup_steps": 0,
        "beta1": 0.9,
        "beta2": 0.95,
        "weight_decay": 1e-4,
        "clip_norm": 1.0,  # 0: no clipping
        "ema_decay": 0.0,  # 0: no average
    },
    "train": {
        "num_steps": 0,
        "batch_size": 0,
        "accumulation": 1,  # microbatches a step
        "drop_label": 0.0,  # probability of training an image without its label
        "seed": 0,
        "checkpoint_every": 1000,
        "keep_checkpoints": 3,
        "evaluate_every": 0,  # steps between test losses, for the best checkpoint to be kept; 0: only at the end
        "sample_every": 0,  # 0: no previews
        "log_every": 50,
        "profile_steps": (0, 0),  # first and last step of a jax.profiler trace; none
    },
    "sample": {
        "guidance": {
            "weight": 0.0,
            "target": "both",  # or log_scale, shift
            "schedule": "linear",  # or constant
            "attention_temperature": 1.0,
            "rule": "log_scale",  # or scale, product
            "blocks": "all",  # or how many, from the noise
        },
        "denoise_multiplier": 1.0,
    },
    # -1: whatever devices are left, and on a CPU its cores.
    "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
}


def get_config() -> ConfigDict:
    """A recipe without a model's shape, a data set and a number of steps; those are the recipes' own."""
    return ConfigDict(FIELDS)


def likelihood(config: ConfigDict) -> ConfigDict:
    """The variant for bits per dimension: uniform dequantisation, no labels, float32."""
    config.noise.update({"kind": "uniform", "std": 0.0})
    config.model.update({"num_classes": 0, "dtype": "float32"})
    config.model.image_limit = min(config.model.image_limit, 1.0)  # no noise reaches beyond
    config.train.drop_label = 0.0
    config.sample.guidance.update({"weight": 0.3, "attention_temperature": 0.5})
    return config


def smoke(config: ConfigDict) -> ConfigDict:
    """The variant of seconds: the recipe's code on a model that learns little."""
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


def tuned(config: ConfigDict) -> ConfigDict:
    """The variant with what paid in docs/optimizers.md, at the paper's sizes, where it is unmeasured."""
    config.model.update(
        {
            "position_init": "grid",
            "rotary": True,
            "input_limit": 10.0,
            "image_limit": 1.0 + 5.0 * config.noise.std,
            "triangular": config.model.patch_size <= 4,  # its outputs grow as the fourth power of the patch size
        }
    )
    rate = 5e-3 * 128 / config.model.width  # the best one falls so from width 64 to 256
    config.optimizer.update({"name": "muon", "muon_learning_rate": rate, "learning_rate": 1e-3, "clip_norm": 1.0})
    return config


def levels(config: ConfigDict) -> ConfigDict:
    """A recipe of one noise level at all of them, with the draw that paid in docs/noise_levels.md."""
    config.model.update({"noise_conditional": True, "image_limit": 2.5})
    config.noise.update({"kind": "levels", "std": 0.0, "std_min": 0.01, "std_max": 0.3, "draw": "variance"})
    return config


def with_variant(config: ConfigDict, variant: str, *known: Callable[[ConfigDict], ConfigDict]) -> ConfigDict:
    """Applies the variant of this name, "" for none; raises ValueError for another than the `known` ones.

    These are `likelihood` and `smoke` if none is given.
    """
    variants = {function.__name__: function for function in known or (likelihood, smoke)}
    if not variant:
        return config
    if variant not in variants:
        raise UserError(f"unknown variant {variant!r}; expected {', '.join(variants)}")
    return variants[variant](config)
