"""Images from a NumPy archive: `images` and perhaps `labels`, or `arr_0` and `arr_1` as ADM names them."""

from pathlib import Path

from tarflow_jax.data.source import ArraySource, Options
from tarflow_jax.data.splits import split_of
from tarflow_jax.errors import UserError
from tarflow_jax.files import read_npz


def open_npz(argument: str, split: str, options: Options) -> ArraySource:
    """Reads one split of an archive into memory; the split is by the stable hash of the image's index.

    Raises FileNotFoundError, or ValueError where the file holds no uint8 images [N, H, W] or [N, H, W, K].
    """
    path = Path(argument).expanduser()
    name = f"npz:{path}"
    if not path.is_file():
        raise FileNotFoundError(f"{name}: no such file")
    expected = f"{name}: expected an .npz with uint8 arrays `images` and `labels`, or `arr_0` and `arr_1`"
    try:
        arrays = read_npz(path, ("images", "labels", "arr_0", "arr_1"))
    except UserError as error:
        raise UserError(f"{expected} ({error})") from None
    images, labels = arrays.get("images", arrays.get("arr_0")), arrays.get("labels", arrays.get("arr_1"))
    if images is None:
        raise UserError(expected)
    if images.ndim == 3:
        images = images[..., None]
    num_classes = int(labels.max()) + 1 if labels is not None and labels.size else 0
    everything = ArraySource(name, images, labels, num_classes)
    chosen = [index for index in range(len(images)) if split_of(str(index)) == split]
    return ArraySource(name, everything.images[chosen], everything.labels[chosen], num_classes)
