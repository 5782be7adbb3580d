"""Reads and writes folders of diffusers' AutoencoderKL. Both files are validated, and neither can execute code."""

import dataclasses
import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from etils import epath

from tarflow_jax.autoencoder.config import AutoencoderConfig
from tarflow_jax.autoencoder.network import AutoencoderKL
from tarflow_jax.errors import UserError, one_line
from tarflow_jax.files import replacing
from tarflow_jax.interop.tensors import flatten, read_safetensors, unflatten
from tarflow_jax.options import shown
from tarflow_jax.runtime.parameters import Shape

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
_CLASS = "AutoencoderKL"
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # before diffusers 0.17
_TO_TORCH = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}  # transposition by rank; kernels here are [H, W, in, out]


@functools.cache
def params_shapes(config: AutoencoderConfig) -> dict[str, Shape]:
    """Shapes of the parameters, "encoder/conv_in/kernel" and so on."""
    images = jax.ShapeDtypeStruct((1, config.factor, config.factor, config.image_channels), jnp.float32)
    variables = jax.eval_shape(AutoencoderKL(config).init, jax.random.key(0), images)
    return {name: leaf.shape for name, leaf in flatten(variables["params"]).items()}


def read_folder(folder: Path) -> tuple[AutoencoderConfig, dict[str, Any]]:
    """Reads (config, float32 params) from a folder or its subfolder vae/; raises FileNotFoundError or UserError."""
    folder = next((each for each in (folder, folder / "vae") if (each / CONFIG).is_file()), folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"no {name} in {folder}; expected an AutoencoderKL in diffusers' format")
    config = _read_config(folder / CONFIG)
    return config, _read_params(folder / WEIGHTS, config)


def write_folder(folder: epath.Path, config: AutoencoderConfig, params: Any, dtype: str = "float32") -> None:
    """Writes both files, or none."""
    if (folder / CONFIG).exists():
        _read_config(folder / CONFIG)  # UserError if it is another model's
    # Fields unknown to diffusers, which reads a network of patches as one of images with more channels.
    ours = {"dtype": config.dtype, "latent_std": 0.0, "noise_std": 0.0, "patch_size": 1}
    fields = {name: value for name, value in config.to_dict().items() if value != ours.get(name)}
    del fields["image_channels"]
    fields |= {"sample_size": 512, **_constant(config)}  # the side of diffusers' tiles, in pixels
    flat = {name: np.array(array, np.float32) for name, array in flatten(params).items()}
    if config.latent_std:  # unknown to diffusers, so the weights produce it too
        last = "quant_conv" if config.use_quant_conv else "encoder/conv_out"
        flat[f"{last}/kernel"][..., config.latent_channels :] = 0
        flat[f"{last}/bias"][config.latent_channels :] = 2 * math.log(config.latent_std)
    flat = {_torch_name(name): array.transpose(_TO_TORCH[array.ndim]) for name, array in flat.items()}
    flat = {name: np.ascontiguousarray(array, jnp.dtype(dtype)) for name, array in flat.items()}
    with replacing(folder / CONFIG) as text, replacing(folder / WEIGHTS) as weights:
        text.write((json.dumps(fields, indent=2) + "\n").encode())
        text.flush()  # a full disk fails here, before the first file appears
        weights.write(safetensors.numpy.save(flat, {"format": "pt"}))


def _constant(config: AutoencoderConfig) -> dict[str, Any]:
    """Returns the fields of diffusers' config that have only one value here."""
    levels = len(config.block_out_channels)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    channels = {"in_channels": config.patch_channels, "out_channels": config.patch_channels}
    others = {"act_fn": "silu", "latents_mean": None, "latents_std": None}
    return {"_class_name": _CLASS, **channels, **blocks, **others}


def _read_config(path: epath.Path) -> AutoencoderConfig:
    try:
        given = json.loads(path.read_bytes())
        found = given.get("_class_name") if isinstance(given, dict) else given
        if found != _CLASS:
            raise UserError(f"_class_name is {shown(found)}; expected {_CLASS!r}")
        other = {*_constant(AutoencoderConfig()), "sample_size", "force_upcast"}
        fields = {name: value for name, value in given.items() if name[:1] != "_" and name not in other}
        fields |= {"image_channels": given.get("in_channels", 3), "shift_factor": given.get("shift_factor") or 0.0}
        defaults = {"block_out_channels": [64], "layers_per_block": 1}  # diffusers' defaults where ours differ
        config = AutoencoderConfig.from_dict(defaults | fields)
        config = dataclasses.replace(config, image_channels=config.image_channels // config.patch_size**2)
        for name, value in _constant(config).items():
            if given.get(name, value) != value:
                raise UserError(f"{name} is {shown(given[name])}; expected {shown(value)}, the only one known here")
        return config
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {one_line(error)}") from error


def _read_params(path: Path, config: AutoencoderConfig) -> dict[str, Any]:
    names = {_torch_name(name): name for name in params_shapes(config)}
    expected = {torch: params_shapes(config)[name][::-1] for torch, name in names.items()}  # kernels are square
    old = r"(?<=\.attentions\.0\.)(query|key|value|proj_attn)(?=\.)"
    rename = functools.partial(re.sub, old, lambda match: _OLD_ATTENTION[match[0]])
    tensors = read_safetensors(path, expected, rename)
    return unflatten({names[torch]: x.transpose(np.argsort(_TO_TORCH[x.ndim])) for torch, x in tensors.items()})


def _torch_name(name: str) -> str:
    """ "encoder/down_blocks_0/resnets_1/norm1/scale" -> "encoder.down_blocks.0.resnets.1.norm1.weight"."""
    name = re.sub(r"(samplers_0)/", r"\1/conv/", name)
    *path, leaf = re.sub(r"_(\d+)/", r".\1/", name).split("/")
    return ".".join([*path, "bias" if leaf == "bias" else "weight"])
