"""STARFlow's class-conditional model of ImageNet 256x256 (arXiv 2506.06276), over latents 32x32x4.

python -m launch.prepare_data --data=packed:FOLDER --autoencoder=sd-vae-ft-ema
python -m launch.train --config=configs/starflow_imagenet256.py --config.data.source=latents:FOLDER \
    --workdir=gs://BUCKET/run

Class embeddings are added to the tokens; in the release, a class is a prefix of one token. Never trained with this
code; paper: FID 2.40. Hardware, by launch.plan: docs/howto/text_to_image.md.
"""

from ml_collections import ConfigDict

from configs import defaults, starflow_t2i256


def get_config(variant: str = "") -> ConfigDict:
    """Returns the recipe of the text-to-image model, narrower and with classes in place of captions."""
    config = starflow_t2i256.get_config()
    with config.model.ignore_type():
        config.model.layers_per_block = (2, 2, 2, 2, 2, 18)
    config.model.update(
        {
            "width": 2048,
            "num_classes": 1000,
            "condition_kind": "vector",
            "condition_dim": 0,
            "condition_length": 0,
            "condition_blocks": 0,
        }
    )
    config.optimizer.learning_rate = 1e-4
    config.train.update({"num_steps": 400_000, "batch_size": 512})
    return defaults.with_variant(config, variant, defaults.smoke)
