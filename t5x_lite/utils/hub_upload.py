# SPDX-License-Identifier: Apache-2.0
"""Uploads of an exported model to the Hugging Face hub."""

from pathlib import Path

from t5x_lite.utils import hub_errors, hub_names
from t5x_lite.utils.hub_errors import HubError
from t5x_lite.utils.hub_names import HubName

CARD = "README.md"
# Weights of an earlier upload: files of other names would stay beside the new ones.
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "checkpoints/*")


def parse_destination(text: str) -> HubName:
    """The model to upload to.

    Raises:
      ValueError: it is not owner/name or owner/name@branch.
    """
    match = hub_names.NAME.fullmatch(text)
    if match is None or match["file"] is not None:
        raise ValueError(f"--push uploads to --to=owner/name or owner/name@branch; got {text!r}")
    return HubName(match["repo"], match["revision"])


def check_login(name: HubName) -> None:
    """Raises HubError where nobody is logged in who could upload: before hours of conversion."""
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise HubError(f"{name} cannot be uploaded to: HF_HUB_OFFLINE is set")
    if huggingface_hub.get_token() is None:
        raise HubError(
            f"Uploading to {name} needs a token that may write: hf auth login, or HF_TOKEN in the "
            "environment"
        )
    with hub_errors.hub_errors(name):
        huggingface_hub.HfApi().whoami()


def upload_folder(folder: Path, name: HubName, private: bool, message: str) -> str:
    """Uploads all files of a folder as one commit; returns the model's address.

    A model card that is there already stays as it is. Files that were uploaded before a failure
    are not uploaded again.

    Args:
      folder: the folder.
      name: the model, which is created if it does not exist.
      private: a model that is created can be seen by its owner alone.
      message: message of the commit.

    Raises:
      HubError: the hub refuses it, or cannot be reached; the commit is whole or not there.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    with hub_errors.hub_errors(name):
        api.create_repo(name.repo, private=private, exist_ok=True)
        if name.revision is not None:
            api.create_branch(name.repo, branch=name.revision, exist_ok=True)
        there = api.list_repo_files(name.repo, revision=name.revision)
        api.upload_folder(
            repo_id=name.repo,
            folder_path=folder,
            revision=name.revision,
            commit_message=message,
            ignore_patterns=[CARD] if CARD in there else None,
            delete_patterns=list(WEIGHTS),
        )
    return hub_errors.page_address(name)
