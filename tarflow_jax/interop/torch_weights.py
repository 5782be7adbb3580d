"""Reads and writes PyTorch checkpoints of the references (apple/ml-tarflow, apple/ml-itarflow, apple/ml-starflow).

A Linear's weight [out, in] is our kernel [in, out], with `out` or `in` split into axes. The outputs of qkv are in the
same order, (q or k or v, head, head dimension). The reference orders the numbers of a token (channel, row, column),
this package (row, column, channel), so the tensors that read or write tokens are permuted here, never at run time.
STARFlow has our order, but its rotary embeddings rotate neighbouring pairs, so its queries and keys are permuted.
"""

import dataclasses
import math
import os
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tarflow_jax.errors import UserError, one_line
from tarflow_jax.files import replacing
from tarflow_jax.flow.config import TarFlowConfig
from tarflow_jax.interop.tensors import check_tensors, flatten, import_torch, load_tensors, unflatten
from tarflow_jax.runtime import progress
from tarflow_jax.runtime.parameters import Parameter, Shape, row_of, variables_shapes

HEAD_DIM = 64  # fixed in the reference; no tensor's shape depends on it
# Fields shared by all models of the STARFlow release. A file does not show scale_function and output_limit.
STARFLOW = {
    "rotary": True,
    "position_init": "none",
    "start_token": True,
    "final_norm": True,
    "scale_function": "softplus",
    "output_limit": 4.0,
}
# Fields in which the models of a reference differ; all others have their defaults or, for STARFlow, those above.
_FREE = {"image_size", "image_channels", "patch_size", "width", "num_blocks", "layers_per_block", "image_bits"}
_FREE |= {"dtype", "remat", "attention"}
_FREE_TARFLOW = _FREE | {"num_classes", "volume_preserving", "noise_conditional", "position_init"}
_FREE_STARFLOW = _FREE | {f"condition_{part}" for part in ("kind", "dim", "length", "blocks")}
_FREE_STARFLOW |= {"orders", "rotary_base_size"}


def load_torch(
    path: str | os.PathLike[str],
    image_size: int | tuple[int, int],
    image_channels: int,
    patch_size: int,
    base_size: int | None = None,
    orders: str | None = None,
    place: Callable[[Any], Any] = jax.device_put,
) -> tuple[TarFlowConfig, dict[str, Any]]:
    """Reads a state dict of a reference, one variable at a time, without executing code in it.

    The tensors determine width, blocks, layers, classes, VP or NVP, and D, but not how D divides into image_channels K
    and patch_size P. For TarFlow they also determine T; STARFlow draws images of any size.

    Args:
      path: the file.
      image_size: a side, or height and width.
      image_channels: K.
      patch_size: P.
      base_size: for STARFlow, the side in tokens to which positions are scaled; None for that of its training.
      orders: for STARFlow, "alternate" (its R2L) or "backwards_first" (L2R); None chooses the latter for models with a
        prefix, as in the release, and else the former, its default.
      place: puts a tree of variables on devices.

    Returns:
      (config, variables), float32 arrays.

    Raises:
      FileNotFoundError: there is no such file.
      ImportError: PyTorch is not installed.
      ValueError: a damaged or foreign file, a missing, extra or misshapen tensor, or tensors that contradict
        the image and patch size.
    """
    path = Path(path)
    state = _read_state_dict(path)
    if any(".time_embed." in name for name in state):  # early files of ml-itarflow use ml-tarflow's names
        state = {name.replace(".attn_blocks.", ".head_blocks."): tensor for name, tensor in state.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    config = _read_config(path, shapes, (image_size, image_channels, patch_size), base_size, orders)
    trained = shapes["var"][0] if config.start_token else config.num_tokens
    buffers, tensors = _buffers(config, trained), list(_tensors(config))
    expected = {name: row.torch_shape(config) for _, row, names in tensors for name in names}
    expected |= {name: buffer.shape for name, buffer in buffers.items()}
    check_tensors(str(path), shapes, expected)
    for name, buffer in buffers.items():
        if not np.array_equal(state[name].float().numpy(), buffer):
            raise UserError(f"{path}: buffer {name} has other values than a reference's, so this is not its TarFlow")
    variables: dict[str, Any] = {}
    for name, row, torch_names in progress(tensors, f"reading {path.name}"):
        # Popped, so that the file's copy of a tensor is freed as soon as it is converted.
        parts = [state.pop(torch_name).float().numpy() for torch_name in torch_names]
        variables |= flatten(place(unflatten({name: _from_torch(config, row, parts)})))
    if config.has_prefix:
        variables |= flatten(place({"constants": {"null_prefix": np.zeros(config.condition_shape, np.float32)}}))
    return config, unflatten(variables)


def save_torch(path: str | os.PathLike[str], config: TarFlowConfig, variables: Mapping[str, Any]) -> None:
    """Writes a state dict that the reference loads with strict=True; the inverse of `load_torch`.

    The reference has no null condition of a prefix, so it is not written.

    Raises:
      ImportError: PyTorch is not installed.
      ValueError: the reference has no model of this shape, the variables do not fit `config`, or the disk is full.
    """
    torch = import_torch()
    _check_representable(config)
    flat = flatten(variables)
    check_tensors("the model", {name: value.shape for name, value in flat.items()}, variables_shapes(config))
    trained = config.rotary_base_size**2 or config.num_tokens
    state = {name: torch.from_numpy(buffer) for name, buffer in _buffers(config, trained).items()}
    for name, row, torch_names in progress(list(_tensors(config)), "converting"):
        parts = _to_torch(config, row, np.asarray(flat[name], np.float32))
        for torch_name, part in zip(torch_names, parts, strict=True):
            state[torch_name] = torch.from_numpy(part.copy())
    with replacing(path) as file:
        try:
            torch.save(state, file)  # given a path, it would write the temporary name into the file
        except RuntimeError as error:  # how its writer reports an OSError
            raise UserError(f"{path} cannot be written ({one_line(error)}); is the disk full?") from error


def _read_state_dict(path: Path) -> dict[str, Any]:
    """Reads named floating-point tensors from an intact file."""
    if not path.is_file():
        raise FileNotFoundError(f"no PyTorch checkpoint at {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # PyTorch ignores the checksums
                raise UserError(f"entry {damaged} fails its checksum")
    except Exception as error:  # damaged bytes can raise anything in the zip reader
        reason = f"as torch.save writes it since 1.6: {one_line(error)}"
        raise UserError(f"{path} is not an intact PyTorch state dict, {reason}") from error
    state = load_tensors(path, mapped=True)
    for name, tensor in state.items():
        if not tensor.is_floating_point() or tensor.element_size() > 4:
            raise UserError(f"{path}: tensor {name} is {tensor.dtype}; expected float32")
    wrapped = all(name.startswith("module.") for name in state)  # by DistributedDataParallel
    return {name.removeprefix("module.") if wrapped else name: tensor.detach() for name, tensor in state.items()}


def _read_config(
    path: Path, shapes: Mapping[str, Shape], images: tuple[Any, int, int], base_size: int | None, orders: str | None
) -> TarFlowConfig:
    """Infers the config from the shapes; `check_tensors` then verifies every tensor against it."""
    is_starflow = "blocks.0.sos_embed" in shapes
    if not is_starflow and (base_size or orders):
        raise UserError(f"{path} is no STARFlow; leave base_size and orders out")
    try:
        fields = _starflow_fields(shapes, base_size, orders) if is_starflow else _tarflow_fields(shapes)
        width, token_dim = shapes["blocks.0.proj_in.weight"]
        depths = _depths(shapes, "head_blocks" if fields.get("noise_conditional") else "attn_blocks")
        trained = None if is_starflow else shapes["blocks.0.pos_embed"][0]
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{path} is not a TarFlow of the reference: its blocks lack tensors, or have others") from error
    layers = depths[0] if len(set(depths)) == 1 else depths
    fields |= {"width": width, "num_blocks": len(depths), "layers_per_block": layers, "head_dim": HEAD_DIM}
    config = TarFlowConfig(*images, **fields)
    if trained not in (None, config.num_tokens):
        raise UserError(
            f"{path} has {trained} tokens, but {config.num_tokens} patches of {config.patch_size} fill an image"
            f" of {config.image_size[0]}x{config.image_size[1]}; check image_size and patch_size"
        )
    if config.token_dim != token_dim:
        raise UserError(
            f"{path} has tokens of {token_dim} numbers, but patches of {config.patch_size} in {config.image_channels}"
            f" channels have {config.token_dim}; check image_channels and patch_size"
        )
    return config


def _tarflow_fields(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Infers config fields from the shapes in a file of TarFlow or iTARFlow."""
    (outputs, _), (_, token_dim) = shapes["blocks.0.proj_out.weight"], shapes["blocks.0.proj_in.weight"]
    return {
        "num_classes": shapes.get("blocks.0.class_embed", (0,))[0],
        "volume_preserving": outputs == token_dim,
        "noise_conditional": "blocks.0.time_embed.mlp.0.weight" in shapes,
    }


def _starflow_fields(shapes: Mapping[str, Shape], base_size: int | None, orders: str | None) -> dict[str, Any]:
    """Infers config fields from the shapes in a file of STARFlow; `base_size` and `orders` are not in it."""
    (trained, _), (slots, _) = shapes["var"], shapes["blocks.0.attn_mask"]
    if math.isqrt(trained) ** 2 != trained or slots < trained:
        raise ValueError("no mask of a square of tokens")
    prefixes = [shapes[name][1] for name in shapes if re.fullmatch(r"blocks\.\d+\.proj_txt\.weight", name)]
    fields = {
        **STARFLOW,
        "image_bits": 0,  # its images are latents
        "rotary_base_size": base_size or math.isqrt(trained),
        "orders": orders or ("backwards_first" if prefixes else "alternate"),
    }
    if prefixes:
        fields |= {
            "condition_kind": "prefix",
            "condition_dim": prefixes[0],
            "condition_length": slots - trained,
            "condition_blocks": len(prefixes) if len(prefixes) < len(_depths(shapes, "attn_blocks")) else 0,
        }
    return fields


def _depths(shapes: Mapping[str, Shape], layers: str) -> tuple[int, ...]:
    """Returns the number of layers of each block; `layers` is their name in the file."""
    num_blocks = len({match[1] for name in shapes if (match := re.match(r"blocks\.(\d+)\.", name))})
    matches = (re.match(rf"blocks\.(\d+)\.{layers}\.(\d+)\.", name) for name in shapes)
    depth_of = Counter(block for block, _ in {match.groups() for match in matches if match})
    return tuple(depth_of[str(k)] for k in range(num_blocks))


def _check_representable(config: TarFlowConfig) -> None:
    """Raises UserError if the reference has no model of this config."""
    height, width = config.image_size
    free, fixed = (_FREE_STARFLOW, STARFLOW) if config.start_token else (_FREE_TARFLOW, {})
    for field in dataclasses.fields(config):
        value, expected = getattr(config, field.name), fixed.get(field.name, field.default)
        if field.name not in free and value != expected:
            raise UserError(f"the PyTorch reference has {field.name} {expected}; this model's is {value}")
    if config.random_orders or config.standardizes_condition:
        raise UserError("the PyTorch reference has no random orders, and no condition but a prefix")
    if config.start_token:
        if not config.rotary_base_size:
            raise UserError("the PyTorch reference has rotary embeddings by slot; this model's are by patch")
        return
    if not config.position_embeddings:
        raise UserError("the PyTorch reference has position embeddings; this model has none")
    if height != width:
        raise UserError(f"the PyTorch reference has only square images; this model's are {height}x{width}")
    if len(set(config.depths)) != 1 and not config.noise_conditional:
        raise UserError(f"the PyTorch reference has blocks of equal depth; this model's are {config.depths}")


def _tensors(config: TarFlowConfig) -> Iterator[tuple[str, Parameter, list[str]]]:
    """Yields each variable's name, its row in the table, and its names in the reference (one per stacked layer)."""
    layers = "head_blocks" if config.noise_conditional else "attn_blocks"
    for name in variables_shapes(config):
        row = row_of(name)
        if not row.torch:  # the null condition of a prefix
            continue
        if not row.in_block:
            yield name, row, [row.torch]
            continue
        k = int(re.findall(r"block_(\d+)/", name)[0])
        parts = [f"{layers}.{layer}." for layer in range(config.depths[k])] if row.stacked else [""]
        yield name, row, [f"blocks.{k}.{part}{row.torch}" for part in parts]


def _buffers(config: TarFlowConfig, tokens: int) -> dict[str, np.ndarray]:
    """Returns the reference's constant buffers for an image of `tokens` tokens.

    They are the causal masks, in NVP mode the prior's variance of ones, and in STARFlow zeros in place of angles.
    """
    slots = tokens + config.condition_length
    mask = np.tri(slots, dtype=np.float32)
    buffers = {f"blocks.{k}.attn_mask": mask for k in range(config.num_blocks)}
    if not config.volume_preserving:
        buffers["var"] = np.ones((tokens, config.token_dim), np.float32)
    if config.start_token:
        buffers |= {f"feat_rope.freqs_{wave}": np.zeros((slots, HEAD_DIM), np.float32) for wave in ("cos", "sin")}
    return buffers


def _from_torch(config: TarFlowConfig, row: Parameter, parts: list[np.ndarray]) -> np.ndarray:
    parts = [part.T if row.input_axes else part for part in parts]
    # Stacked into a C-ordered array, because reshaping any other would copy it.
    stacked = np.stack(parts, out=np.empty((len(parts), *parts[0].shape), np.float32))
    return _reorder(config, row, stacked.reshape(row.shape(config, depth=len(parts))))


def _to_torch(config: TarFlowConfig, row: Parameter, array: np.ndarray) -> list[np.ndarray]:
    """The inverse of `_from_torch`."""
    array, shape = _reorder(config, row, array, inverse=True), row.torch_shape(config)
    parts = list(array) if row.stacked else [array]
    return [part.reshape(shape[::-1]).T if row.input_axes else part.reshape(shape) for part in parts]


def _reorder(config: TarFlowConfig, row: Parameter, array: np.ndarray, inverse: bool = False) -> np.ndarray:
    """Reorders the axes over a token's numbers from (channel, row, column) to (row, column, channel).

    For STARFlow, reorders the head axes of queries and keys instead, from neighbouring pairs to pairs of halves.
    """
    if config.start_token:
        if "qkv" in row.name:  # [..., 3, N, H]
            pairs = np.arange(HEAD_DIM).reshape((2, -1) if inverse else (-1, 2)).T.reshape(-1)
            array = array.copy() if inverse else array
            for layer in array:  # one at a time, or they would take as much memory again
                layer[..., :2, :, :] = layer[..., :2, :, :][..., pairs]
        return array
    patch = (config.image_channels, config.patch_size, config.patch_size)
    order = np.arange(config.token_dim).reshape(patch).transpose(1, 2, 0).reshape(-1)
    if inverse:
        order = np.argsort(order)
    for axis, letter in enumerate(row.letters):
        if letter in ("D", "2D"):
            # In NVP mode the output projection returns log_scale, then shift.
            starts = range(0, array.shape[axis], len(order))
            array = np.take(array, np.concatenate([start + order for start in starts]), axis)
    return array
