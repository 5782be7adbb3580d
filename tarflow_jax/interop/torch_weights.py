"""Reads and writes PyTorch checkpoints of the references (apple/ml-tarflow, apple/ml-itarflow, apple/ml-starflow).

A Linear's weight [out, in] is our kernel [in, out], with `out` or `in` split into axes. The outputs of qkv are in the
same order, (q or k or v, head, head dimension). The reference orders the numbers of a token (channel, row, column),
this package (row, column, channel), so the tensors that read or write tokens are permuted here, never at run time.
STARFlow has our order, but its rotary embeddings rotate neighbouring pairs, so its queries and keys are permuted.
"""

import contextlib
import math
import os
import pickletools
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
_TARFLOW = {
    "rotary": False,
    "position_embeddings": True,
    "start_token": False,
    "final_norm": False,
    "scale_function": "exp",
    "output_limit": 0.0,
    "orders": "alternate",
    "condition_dim": 0,
}
_NEITHER = ("input_limit", "image_limit", "triangular", "is_sequence")
_NOT_STARFLOW = ("num_classes", "volume_preserving", "noise_conditional", "random_orders", "standardizes_condition")
_DIRECTORY = 0x10  # a zip entry's attribute; PyTorch's reader treats such an entry as a directory and reads nothing
# The functions that a state dict's pickle calls, and the dtypes of its tensors.
_ALLOWED = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch (?!Untyped|Typed)\w+Storage"
)
_MAX_PICKLE_BYTES = 1 << 22  # it takes 150 bytes per tensor


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
    if any(name.startswith("learnable_self_denoiser.") for name in shapes):
        raise UserError(f"{path} is a model of videos (it has a learnable_self_denoiser); expected one of images")
    if "blocks.0.sos_embed" in shapes:
        fields = _starflow_fields(path, shapes, base_size, orders)
    elif base_size or orders:
        raise UserError(f"{path} is no STARFlow; leave base_size and orders out")
    else:
        fields = _tarflow_fields(path, shapes)
    images = {"image_size": image_size, "image_channels": image_channels, "patch_size": patch_size}
    config = _read_config(path, shapes, {**images, **fields})
    trained = shapes["var"][0] if config.start_token else config.num_tokens
    buffers, tensors = _buffers(config, trained), list(_tensors(config))
    expected = {name: row.torch_shape(config) for _, row, names in tensors for name in names}
    expected |= {name: buffer.shape for name, buffer in buffers.items()}
    check_tensors(str(path), shapes, expected)
    for name, buffer in buffers.items():
        if not np.array_equal(state[name].float().numpy(), buffer):
            values = {"attn_mask": "the causal mask", "var": "all ones in an NVP model"}
            value = values.get(name.rpartition(".")[2], "all zeros")
            raise UserError(f"{path}: buffer {name} is not {value}, so this is not a TarFlow of the reference")
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
    """Reads named, dense floating-point tensors, which together take no more memory than the file."""
    if not path.is_file():
        raise FileNotFoundError(f"no PyTorch checkpoint at {path}")
    _check_archive(path)
    state = load_tensors(path, mapped=True)
    for name, tensor in state.items():
        if not tensor.is_floating_point() or tensor.element_size() > 4:
            raise UserError(f"{path}: tensor {name} is {tensor.dtype}; expected float32")
    # A strided view can repeat the same few bytes endlessly; the tensors of a state dict each own their bytes.
    if sum(tensor.nelement() * tensor.element_size() for tensor in state.values()) > path.stat().st_size:
        raise UserError(f"{path}: the tensors claim more bytes than the file has")
    state = {name: tensor.detach().resolve_neg() for name, tensor in state.items()}  # as NumPy needs them
    wrapped = all(name.startswith("module.") for name in state)  # by DistributedDataParallel
    return {name.removeprefix("module.") if wrapped else name: tensor for name, tensor in state.items()}


def _check_archive(path: Path) -> None:
    """Verifies the zip archive's checksums, which PyTorch ignores, and that reading takes no more memory than the file.

    Uncompressed entries cannot expand. PyTorch ignores case in names, so names that differ in case alone could make it
    read one entry many times: tensors must have numbers for names.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.lower() for name in archive.namelist()]
            if len(set(names)) < len(names):
                raise UserError("two entries have the same name")
            for entry in archive.infolist():
                if entry.is_dir() or entry.external_attr & _DIRECTORY:
                    raise UserError(f"entry {entry.filename} is a directory")
                if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                    raise UserError(f"entry {entry.filename} is compressed, which torch.save does not do")
                if "/data/" in entry.filename.lower() and not entry.filename.rpartition("/")[2].isdecimal():
                    raise UserError(f"entry {entry.filename} is no tensor's")
            if damaged := archive.testzip():
                raise UserError(f"entry {damaged} fails its checksum")
            for entry in archive.infolist():
                if entry.filename.lower().endswith("data.pkl"):
                    _check_pickle(archive.read(entry))
    except Exception as error:  # damaged bytes can raise anything in the zip reader
        raise UserError(
            f"{path} is not an intact PyTorch state dict, as torch.save writes it since 1.6: {one_line(error)}"
        ) from error


def _check_pickle(content: bytes) -> None:
    """Raises UserError unless the pickle holds plain tensors alone.

    `torch.load(weights_only=True)` is not enough: a pickle can make it allocate any number of bytes.
    """
    if len(content) > _MAX_PICKLE_BYTES:
        raise UserError(f"its data.pkl has {len(content)} bytes; expected at most {_MAX_PICKLE_BYTES}")
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name == "PROTO" and argument != 2:
            raise UserError(f"its pickle protocol is {argument}; expected 2, the default of torch.save")
        if opcode.name == "GLOBAL" and not _ALLOWED.fullmatch(str(argument)):
            found = str(argument).replace(" ", ".")
            raise UserError(
                f"it holds more than tensors, and other objects are never loaded ({found}); "
                "save `model.state_dict()` alone"
            )


def _tarflow_fields(path: Path, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Infers config fields from the shapes in a file of TarFlow or iTARFlow."""
    if any("shared_backbone" in name for name in shapes):
        raise UserError(f"{path} has layers that its blocks share (shared_backbone_layers); expected none")
    with _foreign(path):
        num_tokens, _ = shapes["blocks.0.pos_embed"]
        num_classes, *_ = shapes.get("blocks.0.class_embed", (0,))
        if shapes["blocks.0.attn_mask"] != (num_tokens, num_tokens):
            raise ValueError("no mask of all tokens")  # `_buffers` would allocate one of any size
        tokens = {shape[0] for name, shape in shapes.items() if re.fullmatch(r"blocks\.\d+\.pos_embed", name)}
        (outputs, _), (_, token_dim) = shapes["blocks.0.proj_out.weight"], shapes["blocks.0.proj_in.weight"]
    if len(tokens) > 1:
        raise UserError(
            f"{path} has blocks of {sorted(tokens)} tokens, so several patch_sizes; expected one for all blocks"
        )
    noise_conditional = "blocks.0.time_embed.mlp.0.weight" in shapes
    return {
        "num_classes": num_classes,
        "volume_preserving": outputs == token_dim,
        "noise_conditional": noise_conditional,
    }


def _starflow_fields(
    path: Path, shapes: Mapping[str, Shape], base_size: int | None, orders: str | None
) -> dict[str, Any]:
    """Infers config fields from the shapes in a file of STARFlow; `base_size` and `orders` are not in it."""
    with _foreign(path):
        trained, _ = shapes["var"]
        slots, others = shapes["blocks.0.attn_mask"]
        if slots != others or math.isqrt(trained) ** 2 != trained or not 0 < trained <= slots:
            raise ValueError("no mask of a square of tokens")
        prefixes = [shapes[name][1] for name in shapes if re.fullmatch(r"blocks\.\d+\.proj_txt\.weight", name)]
    fields = {
        **STARFLOW,
        "image_bits": 0,  # its images are latents
        "rotary_base_size": base_size or math.isqrt(trained),
        "orders": orders or "alternate",
    }
    if prefixes:
        fields |= {
            "condition_kind": "prefix",
            "condition_dim": prefixes[0],
            "condition_length": slots - trained,
            "condition_blocks": len(prefixes) if len(prefixes) < _num_blocks(shapes) else 0,
            "orders": orders or "backwards_first",
        }
    return fields


@contextlib.contextmanager
def _foreign(path: Path) -> Iterator[None]:
    """Turns a missing tensor, or one of another shape, into a UserError."""
    try:
        yield
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{path} is not a TarFlow of the reference: its blocks lack tensors, or have others") from error


def _num_blocks(shapes: Mapping[str, Shape]) -> int:
    return len({match[1] for name in shapes if (match := re.match(r"blocks\.(\d+)\.", name))})


def _read_config(path: Path, shapes: Mapping[str, Shape], fields: Mapping[str, Any]) -> TarFlowConfig:
    """Infers what `fields` lack from the shapes; `check_tensors` then verifies every tensor against the config."""
    with _foreign(path):
        width, token_dim = shapes["blocks.0.proj_in.weight"]
    layers = "head_blocks" if fields.get("noise_conditional") else "attn_blocks"
    matches = (re.match(rf"blocks\.(\d+)\.{layers}\.(\d+)\.", name) for name in shapes)
    depth_of = Counter(block for block, _ in {match.groups() for match in matches if match})
    depths = tuple(depth_of[str(k)] for k in range(_num_blocks(shapes)))
    config = TarFlowConfig(
        **fields,
        width=width,
        layers_per_block=depths[0] if len(set(depths)) == 1 else depths,
        num_blocks=len(depths),
        head_dim=HEAD_DIM,
    )
    patch_size = config.patch_size
    num_tokens, _ = shapes.get("blocks.0.pos_embed", (config.num_tokens, 0))
    if config.num_tokens != num_tokens:
        raise UserError(
            f"{path} has {num_tokens} tokens, but {config.num_tokens} patches of {patch_size} fill an image"
            f" of {config.image_size[0]}x{config.image_size[1]}; check image_size and patch_size"
        )
    if config.token_dim != token_dim:
        raise UserError(
            f"{path} has tokens of {token_dim} numbers, but patches of {patch_size} in {config.image_channels}"
            f" channels have {config.token_dim}; check image_channels and patch_size"
        )
    return config


def _check_representable(config: TarFlowConfig) -> None:
    height, width = config.image_size
    required: dict[str, Any] = dict.fromkeys(_NEITHER) | _TARFLOW
    if config.start_token:
        required = dict.fromkeys((*_NEITHER, *_NOT_STARFLOW)) | STARFLOW
        if not config.rotary_base_size:
            raise UserError("the PyTorch reference has rotary embeddings by slot; this model's are by patch")
    elif height != width:
        raise UserError(f"the PyTorch reference has only square images; this model's are {height}x{width}")
    elif len(set(config.depths)) != 1 and not config.noise_conditional:
        raise UserError(f"the PyTorch reference has blocks of equal depth; this model's are {config.depths}")
    for name, value in required.items():
        found = getattr(config, name)
        if found != (value or type(found)()):
            has = f"{name} {value}" if value else f"no {name}"
            raise UserError(f"the PyTorch reference has {has}; this model's is {found}")
    if config.head_dim != HEAD_DIM:
        raise UserError(f"the PyTorch reference has head_dim {HEAD_DIM}; this model's is {config.head_dim}")


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
