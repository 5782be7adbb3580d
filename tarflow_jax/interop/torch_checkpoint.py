"""Checkpoints of the reference (apple/ml-tarflow, PyTorch): a state dict's file <-> config and variables."""

import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from tarflow_jax.errors import MissingPackageError, UserError, one_line
from tarflow_jax.files import replacing
from tarflow_jax.flow.config import TarFlowConfig
from tarflow_jax.interop.layout import check_tensors, flatten, unflatten
from tarflow_jax.interop.torch_layout import constants, from_torch, to_torch, torch_names, torch_shapes
from tarflow_jax.runtime import progress
from tarflow_jax.runtime.parameters import Shape, variables_shapes

HEAD_DIM = 64  # fixed in the reference, so no tensor tells it
_DIRECTORY = 0x10  # the bit of an entry's attributes by which PyTorch's reader takes it for one, and reads nothing


def load_torch(
    path: str | os.PathLike[str], image_size: int | tuple[int, int], image_channels: int, patch_size: int
) -> tuple[TarFlowConfig, dict[str, Any]]:
    """Reads a state dict of the reference; only data is read, no code is run.

    Args:
      path: a file that `torch.save(model.state_dict(), path)` wrote.
      image_size: side, or (height, width), in pixels.
      image_channels: K.
      patch_size: P. The tensors tell T and D, but not how they divide into these three.

    Returns (config, variables): width, blocks, layers, classes and VP/NVP are read off the tensors; float32 arrays.

    Raises:
      FileNotFoundError: there is no such file.
      ImportError: PyTorch is not installed.
      ValueError: a damaged or foreign file, a missing, extra or misshapen tensor, or tensors that contradict
        the image and patch size.
    """
    path = Path(path)
    state = _read_state_dict(path)
    if any(".time_embed." in name for name in state):  # older files have the other release's name
        state = {name.replace(".attn_blocks.", ".head_blocks."): tensor for name, tensor in state.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    _check_supported(path, shapes)
    config = _config_of(path, shapes, image_size, image_channels, patch_size)
    check_tensors(str(path), shapes, torch_shapes(config))
    _check_constants(path, config, state)
    variables = {}
    for name in progress(variables_shapes(config), f"reading {path.name}"):
        # Popped, so that the file's copy of a tensor is freed as soon as ours is made.
        parts = [state.pop(part).float().numpy() for part in torch_names(config, name)]
        variables[name] = jnp.asarray(from_torch(config, name, parts))
    return config, unflatten(variables)


def save_torch(path: str | os.PathLike[str], config: TarFlowConfig, variables: Mapping[str, Any]) -> None:
    """Writes a state dict that the reference loads with strict=True; the inverse of `load_torch`.

    Raises:
      ImportError: PyTorch is not installed.
      ValueError: the reference has no model of this shape, or the variables are not of `config`.
    """
    torch = _import_torch()
    _check_representable(config)
    flat = flatten(variables)
    shapes = variables_shapes(config)
    check_tensors("the model", {name: value.shape for name, value in flat.items()}, shapes)
    state = {name: torch.from_numpy(array.copy()) for name, array in constants(config).items()}
    for name in progress(shapes, "converting"):
        parts = to_torch(config, name, np.asarray(flat[name], np.float32))
        for torch_name, part in zip(torch_names(config, name), parts, strict=True):
            state[torch_name] = torch.from_numpy(np.array(part, order="C"))
    with replacing(path) as file:
        torch.save(state, file)  # given a path, it would write the temporary name into the file


def _import_torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise MissingPackageError("PyTorch checkpoints need PyTorch; install it with `pip install torch`") from error
    return torch


def _read_state_dict(path: Path) -> dict[str, Any]:
    torch = _import_torch()
    if not path.is_file():
        raise FileNotFoundError(f"no PyTorch checkpoint at {path}")
    _check_archive(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the reader meets hostile bytes: whatever it raises means "not a state dict"
        reason = one_line(error)
        if "weights only" in reason.lower():  # what follows is advice to load it all the same
            reason = "it holds more than tensors, and other objects are never loaded; save `model.state_dict()` alone"
        raise UserError(f"{path} is not a plain PyTorch state dict: {reason}") from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state.items()
    ):
        raise UserError(f"{path} holds no state dict of tensors; save `model.state_dict()` alone")
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for name, tensor in state.items():
        if tensor.dtype not in dtypes or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise UserError(f"{path}: tensor {name} is {tensor.dtype}, {tensor.layout}; expected dense float32")
    # A view may repeat its numbers without end; a state dict's tensors each own theirs.
    if sum(tensor.nelement() * tensor.element_size() for tensor in state.values()) > path.stat().st_size:
        raise UserError(f"{path}: the tensors claim more bytes than the file has")
    wrapped = all(name.startswith("module.") for name in state)  # by DistributedDataParallel
    return {name.removeprefix("module.") if wrapped else name: tensor for name, tensor in state.items()}


def _check_archive(path: Path) -> None:
    """PyTorch reads its zip archive without looking at the checksums, so they are checked here.

    An entry that is not compressed cannot grow when it is read: the file's size bounds the memory.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.is_dir() or entry.external_attr & _DIRECTORY:
                    raise UserError(f"entry {entry.filename} is a directory")
                if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                    raise UserError(f"entry {entry.filename} is compressed")
            if damaged := archive.testzip():
                raise UserError(f"entry {damaged} fails its checksum")
    except Exception as error:
        raise UserError(f"{path} is not an intact PyTorch checkpoint (zip format): {one_line(error)}") from error


def _check_supported(path: Path, shapes: Mapping[str, Shape]) -> None:
    """Refuses what the noise-conditional release has and we have not."""
    if any("shared_backbone" in name for name in shapes):
        raise UserError(f"{path} has layers that its blocks share (shared_backbone_layers); expected none")
    tokens = {shape[0] for name, shape in shapes.items() if re.fullmatch(r"blocks\.\d+\.pos_embed", name) and shape}
    if len(tokens) > 1:
        raise UserError(
            f"{path} has blocks of {sorted(tokens)} tokens, so several patch_sizes; expected one for all blocks"
        )


def _config_of(
    path: Path, shapes: Mapping[str, Shape], image_size: int | tuple[int, int], image_channels: int, patch_size: int
) -> TarFlowConfig:
    """Reads the config off the shapes; `check_tensors` then verifies every tensor against it."""

    def shape_of(name: str, rank: int) -> Shape:
        shape = shapes.get(f"blocks.0.{name}", ())
        if len(shape) != rank or not all(shape):
            raise UserError(f"{path} is no TarFlow: blocks.0.{name} has shape {list(shape)}; expected rank {rank}")
        return shape

    width, token_dim = shape_of("proj_in.weight", 2)
    num_tokens = shape_of("pos_embed", 2)[0]
    outputs = shape_of("proj_out.weight", 2)[0]
    if outputs not in (token_dim, 2 * token_dim):
        raise UserError(f"{path}: proj_out has {outputs} outputs; expected {token_dim} (VP) or {2 * token_dim} (NVP)")
    noise_conditional = "blocks.0.time_embed.mlp.0.weight" in shapes
    num_blocks, layers = _count(shapes, r"blocks\.(\d+)\."), "head_blocks" if noise_conditional else "attn_blocks"
    depths = tuple(_count(shapes, rf"blocks\.{k}\.{layers}\.(\d+)\.") for k in range(num_blocks))
    config = TarFlowConfig(
        image_size=image_size,  # type: ignore[arg-type]  # an int becomes a pair
        image_channels=image_channels,
        patch_size=patch_size,
        width=width,
        layers_per_block=depths[0] if len(set(depths)) == 1 else depths,
        num_blocks=num_blocks,
        num_classes=shape_of("class_embed", 3)[0] if "blocks.0.class_embed" in shapes else 0,
        volume_preserving=outputs == token_dim,
        head_dim=HEAD_DIM,
        noise_conditional=noise_conditional,
    )
    if config.num_tokens != num_tokens:
        raise UserError(
            f"{path} has {num_tokens} tokens, but {config.num_tokens} patches of {patch_size} fill an image"
            f" of {config.image_size[0]}x{config.image_size[1]}; check image_size and patch_size"
        )
    if config.token_dim != token_dim:
        raise UserError(
            f"{path} has tokens of {token_dim} numbers, but patches of {patch_size} in {image_channels}"
            f" channels have {config.token_dim}; check image_channels and patch_size"
        )
    return config


def _check_constants(path: Path, config: TarFlowConfig, state: dict[str, Any]) -> None:
    """Takes the unchanging buffers out of `state`; another value would make another model than ours."""
    for name, array in constants(config).items():
        if not np.array_equal(state.pop(name).float().numpy(), array):
            expected = "the causal mask" if name.endswith("attn_mask") else "all ones in an NVP model"
            raise UserError(f"{path}: buffer {name} is not {expected}, so this is no TarFlow of the reference")


def _count(names: Mapping[str, Any], pattern: str) -> int:
    return len({match[1] for name in names if (match := re.match(pattern, name))})


def _check_representable(config: TarFlowConfig) -> None:
    height, width = config.image_size
    if height != width:
        raise UserError(f"the PyTorch reference has only square images; this model's are {height}x{width}")
    if len(set(config.depths)) != 1 and not config.noise_conditional:
        raise UserError(f"the PyTorch reference has blocks of equal depth; this model's are {config.depths}")
    for name in ("rotary", "input_limit", "image_limit", "triangular"):
        if value := getattr(config, name):
            raise UserError(f"the PyTorch reference has no {name}; this model's is {value}")
    if config.head_dim != HEAD_DIM:
        raise UserError(f"the PyTorch reference has head_dim {HEAD_DIM}; this model's is {config.head_dim}")
