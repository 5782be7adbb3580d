"""The fields that every student's recipe shares, with their defaults.

Model, data and noise are those of the flow; `launch.distill` takes them from its workdir.
"""

from ml_collections import ConfigDict

from configs import common
from tarflow_jax.errors import UserError

# Read as that of configs/common.py is.
FIELDS = {
    "student": {
        "width": 0,  # of its transformers; 0: the flow's
        "layers_per_block": (2,),  # one number, or one a block: the flow's, last to first, and the denoiser
        "method": "hidden_alignment",  # or hidden_distillation, naive
        "max_guidance": 0.0,  # largest guidance weight that it takes
        "perceptual": 0.0,  # weight of the clean images' distance as a classifier sees them
        "flow": "",  # fingerprint of its flow's weights; launch.distill fills it in
    },
}


def get_config() -> ConfigDict:
    """A recipe without a number of steps."""
    config = common.get_config()
    for group in ("model", "data", "noise"):
        del config[group]
    config.update(FIELDS)
    config.train.drop_label = 0.1
    return config


def smoke(config: ConfigDict) -> ConfigDict:
    """The variant of seconds."""
    config.student.update({"layers_per_block": (1,), "perceptual": 0.0})
    config.train.update({"num_steps": 20, "batch_size": 16, "checkpoint_every": 10, "log_every": 5})
    config.optimizer.warmup_steps = 5
    return config


def of_flow(config: ConfigDict, flow: ConfigDict) -> ConfigDict:
    """The recipe of a student, with the model, data and noise of its flow's."""
    if "student" not in config:
        raise UserError("--config is no student's recipe; expected one such as configs/student/digits.py")
    whole = ConfigDict({name: flow[name] for name in ("model", "data", "noise")})
    whole.update(config)
    return whole
