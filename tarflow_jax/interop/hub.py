"""Model folders from the Hugging Face hub, and to it."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tarflow_jax.errors import MissingPackageError, UserError, one_line

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
    huggingface_hub = _import_hub(f"no folder {name}; to look for it on the hub, install")
    try:
        return Path(huggingface_hub.snapshot_download(str(name), allow_patterns=list(files)))
    except Exception as error:  # its own errors and those of whatever HTTP library it uses
        raise FileNotFoundError(
            f"no folder {name}, and the hub gave none of that name (is there a network?): {one_line(error)}"
        ) from error


def push_folder(folder: Path, name: str, files: Sequence[str], *, private: bool, token: str | None) -> str:
    """Uploads these files of a folder, in one commit, to the hub's model "owner/name", made if it is missing.

    Args:
      private: of a model that is made.
      token: None is the one that `hf auth login` or HF_TOKEN gave.

    Returns:
      The commit's address.

    Raises:
      ValueError: no such name, or the hub refused.
      ImportError: huggingface_hub is not installed.
    """
    if not _HUB_NAME.fullmatch(name):
        raise UserError(f"{name!r} is no name of a model on the hub; expected owner/name")
    api = _import_hub("to push to the hub, install").HfApi(token=token)
    try:
        api.create_repo(name, private=private, exist_ok=True)
        message = "Upload by tarflow_jax"
        commit = api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=list(files), commit_message=message)
    except Exception as error:  # its own errors and those of whatever HTTP library it uses
        raise UserError(
            f"the hub did not take {name} ({one_line(error)}); is there a network, and was `hf auth login` given a "
            "token that may write there?"
        ) from error
    return str(commit.commit_url)


def _import_hub(why: str) -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingPackageError(f"{why} `pip install huggingface_hub`") from error
    return huggingface_hub
