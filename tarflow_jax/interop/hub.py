"""Model folders from the Hugging Face hub."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from tarflow_jax.errors import MissingPackageError, one_line

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def local_folder(name: str | os.PathLike[str], files: Sequence[str]) -> Path:
    """The folder `name`, or a local copy of these files of the hub's model "owner/name".

    Raises:
      FileNotFoundError: there is no such folder, and no such model or no way to the hub.
      ImportError: there is no such folder, and huggingface_hub is not installed.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.exists() or not _HUB_NAME.fullmatch(str(name)):
        raise FileNotFoundError(f"no folder {name}; give a saved model's folder, or owner/name on the hub")
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingPackageError(
            f"no folder {name}; to look for it on the hub, install `pip install huggingface_hub`"
        ) from error
    try:
        return Path(huggingface_hub.snapshot_download(str(name), allow_patterns=list(files)))
    except Exception as error:  # its own errors and those of whatever HTTP library it uses
        raise FileNotFoundError(
            f"no folder {name}, and the hub gave none of that name (is there a network?): {one_line(error)}"
        ) from error
