"""Locates a model given as a folder, as a hub id, or as the bundled pair."""

from __future__ import annotations

import os
import re
from pathlib import Path

from paceline.checkpoint.checkpoint import shard_names
from paceline.errors import CheckpointError

ASSETS = Path(__file__).parents[1] / "assets"
BUNDLED = ("tiny-python", "tiny-python-assistant")
DRAFTER_SUFFIX = "-assistant"
DRAFTER_FOLDER = "assistant"  # where `paceline convert` puts a drafter, inside its target's folder
NEEDED_FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*")


class Unavailable(CheckpointError):
    """The hub has no such repository, it is private, or it is not in the cache and the hub cannot be reached."""


def locate(model: str) -> Path:
    """The folder of a model, downloaded first if it is a hub id that is not in the cache.

    The names `tiny-python` and `tiny-python-assistant` always mean the bundled pair; write `./tiny-python` for a
    folder of that name.

    Raises:
        CheckpointError: no such folder, no such repository, no access to it, or no network.
    """
    if model in BUNDLED:
        return ASSETS / model
    folder = _local(model)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{model}: is a file; give the folder that holds it with its config.json")
    if not HUB_ID.fullmatch(model):
        raise CheckpointError(f"{model}: no such folder; give a model folder or a hub id such as org/name")
    return _cached(model) or _download(model)


def locate_drafter(model: str, folder: Path, choice: str) -> Path | None:
    """The folder of a target's drafter, or None.

    Args:
        model: the target as the user named it.
        folder: its folder, as `locate` found it.
        choice: "none"; "auto" for the folder or hub id of the target with "-assistant" appended; or the drafter's
            folder or hub id.

    Raises:
        CheckpointError: the drafter is not available. With "auto", None is returned if it does not exist or the hub
            cannot be reached.
    """
    if choice == "none":
        return None
    if choice != "auto":
        return locate(choice)
    if model in BUNDLED or _local(model).is_dir():
        sibling = Path(os.path.abspath(folder) + DRAFTER_SUFFIX)  # abspath, so that "." has a name
        return next((place for place in (folder / DRAFTER_FOLDER, sibling) if place.is_dir()), None)
    try:
        return locate(model + DRAFTER_SUFFIX)
    except Unavailable:
        return None


def _local(model: str) -> Path:
    try:
        folder = Path(model).expanduser()
        folder.exists()
    except (OSError, RuntimeError) as error:  # the name is too long, or the home folder does not exist
        raise CheckpointError(f"{model[:80]}: is not a valid folder name; give a model folder or a hub id") from error
    return folder


def _cached(repository: str) -> Path | None:
    """The cached snapshot if it is complete; an interrupted download leaves a partial one."""
    # imported here because it takes 0.2 s
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repository, allow_patterns=list(NEEDED_FILES), local_files_only=True))
        whole = (folder / "config.json").exists() and all((folder / name).exists() for name in shard_names(folder))
    except (LocalEntryNotFoundError, HFValidationError, CheckpointError):
        return None
    return folder if whole else None


def _download(repository: str) -> Path:
    """Download the needed files to the hub's cache, with progress bars on stderr."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(repository, allow_patterns=list(NEEDED_FILES)))
    except GatedRepoError as error:
        raise CheckpointError(
            f"{repository}: is gated; accept its licence on huggingface.co/{repository} and run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise Unavailable(
            f"{repository}: no such folder here and no such repository on the hub; check the name, "
            "or run `hf auth login` if it is private"
        ) from error
    except Exception as error:  # the hub client raises many types of several libraries
        if isinstance(error, LocalEntryNotFoundError) or type(error).__name__ == "ProxyError":
            raise Unavailable(
                f"{repository}: no such folder here, not in the hub's cache, and the hub cannot be reached; "
                "check the network, or give a local folder"
            ) from error
        first_line = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"{repository}: the download failed ({type(error).__name__}: {first_line}); run the command again to resume"
        ) from error
