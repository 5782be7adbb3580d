"""Downloads and uploads model folders, from and to the Hugging Face hub."""

import os
import re
from pathlib import Path

from tarflow_jax.errors import UserError, one_line

# Everything that a model folder may hold; no other file is downloaded or uploaded.
FILES = [
    *("config.json", "model.safetensors", "README.md", "samples.png", "decoder.json"),
    *("student/config.json", "student/model.safetensors"),
]
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def local_folder(name: str | os.PathLike[str]) -> Path:
    """Returns the folder `name`, or else downloads the hub's model "owner/name" and returns the copy's folder.

    Raises FileNotFoundError: there is no such folder, and no such model on the hub or no network.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.exists() or not _HUB_NAME.fullmatch(str(name)):
        raise FileNotFoundError(f"no folder {name}; give a saved model's folder, or owner/name on the hub")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(str(name), allow_patterns=FILES))
    except Exception as error:  # the hub's errors share no base class with those of its HTTP library
        raise FileNotFoundError(
            f"no folder {name}, and the hub did not return a model of that name (is there a network?): "
            f"{one_line(error)}"
        ) from error


def push_model(folder: str | os.PathLike[str], name: str, *, private: bool = False, token: str | None = None) -> str:
    """Uploads a model folder to the hub as "owner/name", in one commit; creates the repository if it is missing.

    Args:
      private: of a repository that is created.
      token: None uses the token of `hf auth login` or of HF_TOKEN.

    Returns:
      The commit's URL.

    Raises:
      ValueError: not a hub name, or the hub refused.
    """
    if not _HUB_NAME.fullmatch(name):
        raise UserError(f"{name!r} is not the name of a model on the hub; expected owner/name")
    import huggingface_hub

    api = huggingface_hub.HfApi(token=token)
    try:
        api.create_repo(name, private=private, exist_ok=True)
        message = "Upload by tarflow_jax"
        commit = api.upload_folder(repo_id=name, folder_path=str(folder), allow_patterns=FILES, commit_message=message)
    except Exception as error:  # the hub's errors share no base class with those of its HTTP library
        raise UserError(
            f"the hub did not accept {name} ({one_line(error)}); check the network, and that `hf auth login` was given "
            "a token with write access"
        ) from error
    return str(commit.commit_url)
