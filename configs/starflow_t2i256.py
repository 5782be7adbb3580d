"""STARFlow's text-to-image model, 256x256 (arXiv 2506.06276): 3.86 billion parameters over latents 32x32x4.

python -m launch.prepare_data --data=packed:FOLDER --autoencoder=sd-vae-ft-ema --text_encoder=t5:google/flan-t5-xl
python -m launch.train --config=configs/starflow_t2i256.py --config.data.source=latents:FOLDER --workdir=gs://BUCKET/run

Never trained with this code. Hardware, by launch.plan: docs/howto/text_to_image.md.
"""

from ml_collections import ConfigDict

from configs import defaults


def get_config(variant: str = "") -> ConfigDict:
    """Returns the recipe, with the sizes and the optimizer of the release."""
    config = defaults.get_config()
    with config.model.ignore_type():
        config.model.layers_per_block = (2, 2, 2, 2, 2, 24)
    config.model.update(
        {
            "image_size": (32, 32),
            "image_channels": 4,
            "image_bits": 0,
            "patch_size": 1,
            "width": 3072,
            "num_blocks": 6,
            "condition_kind": "prefix",
            "condition_dim": 2048,
            "condition_length": 128,
            "condition_blocks": 1,
            "orders": "backwards_first",
            "start_token": True,
            "scale_function": "softplus",
            "output_limit": 4.0,
            "final_norm": True,
            "position_init": "none",
            "rotary": True,
            "rotary_base_size": 32,
            "dtype": "bfloat16",
            "remat": "full",
        }
    )
    config.data.update({"source": "latents:", "num_workers": 16})
    config.noise.std = 0.3
    config.optimizer.update(defaults.PAPER_OPTIMIZER, learning_rate=6.4e-5, warmup_steps=10_000)
    config.train.update(
        {
            "num_steps": 400_000,
            "batch_size": 1024,
            "drop_label": 0.1,
            "block_penalty": 1e-4,
            "checkpoint_every": 2000,
            "sample_every": 20_000,
        }
    )
    config.sample.guidance.update({"weight": 3.6, "schedule": "constant", "rule": "product"})
    with config.sample.guidance.ignore_type():
        config.sample.guidance.blocks = 1
    return defaults.with_variant(config, variant, defaults.smoke)
