"""The autoencoder of configs/emoji64_text.py: emoji 64x64x3 -> latents 8x8x16.

python -m launch.train_autoencoder --config=configs/emoji64_autoencoder.py --workdir=runs/emoji64_autoencoder

Measured 2026-11-29 (commit b6f3c22, parameters not averaged), two cores of an AMD EPYC: 20 minutes, after 5 of one core
for the network of the perceptual distance. configs/emoji64_text.py says how good it is.
"""

from ml_collections import ConfigDict

from configs import defaults


def get_config(variant: str = "") -> ConfigDict:
    """Returns the recipe; its variant is "smoke" (runs in seconds)."""
    config = defaults.autoencoder_config()
    config.autoencoder.update(
        {
            "latent_channels": 16,
            "patch_size": 2,
            "block_out_channels": (32, 64, 64),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "mid_block_add_attention": False,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "scaling_factor": 1.0,
            "latent_std": 0.3,
        }
    )
    config.reconstruction.update({"perceptual": 0.3, "perceptual_steps": 300, "kl_weight": 1e-2})
    config.data.update({"source": "packed:~/.cache/tarflow_jax/packed/emoji_text-64x64-adm", "num_workers": 1})
    config.optimizer.update({"learning_rate": 2e-3, "warmup_steps": 200})
    config.train.update({"num_steps": 2000, "batch_size": 32, "checkpoint_every": 500, "sample_every": 1000})
    return defaults.with_variant(config, variant, defaults.autoencoder_smoke)
