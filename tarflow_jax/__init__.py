"""TarFlow, a normalizing flow of autoregressive transformers (arXiv 2412.06329), in JAX and Flax."""

from tarflow_jax.density import fit_density
from tarflow_jax.fitting import fit
from tarflow_jax.flow import TarFlow, TarFlowConfig
from tarflow_jax.importance import importance
from tarflow_jax.noise import Noise
from tarflow_jax.pipeline import TarFlowPipeline
from tarflow_jax.sampling import Guidance, IterativeDenoising
from tarflow_jax.text_to_image import TextToImage
from tarflow_jax.version import __version__

__all__ = [
    "Guidance",
    "IterativeDenoising",
    "Noise",
    "TarFlow",
    "TarFlowConfig",
    "TarFlowPipeline",
    "TextToImage",
    "__version__",
    "fit",
    "fit_density",
    "importance",
]
