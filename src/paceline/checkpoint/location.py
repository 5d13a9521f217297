"""Locates a model: a folder, a GGUF, a hub id, a name of another program's, or a bundled pair."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path

from paceline.checkpoint import demo_model, hub, local_stores
from paceline.checkpoint.checkpoint import PACKED_NAME
from paceline.checkpoint.choice import TAG, Wanted, choose_drafter
from paceline.checkpoint.foreign import foreign_file
from paceline.checkpoint.ollama import OLLAMA, ollama_file
from paceline.errors import CheckpointError, PairError

ASSETS = Path(__file__).parents[1] / "assets"
BUNDLED = {
    "tiny-python": ASSETS / "tiny-python",
    "tiny-python-assistant": ASSETS / "tiny-python-assistant",
    "gemma3-270m-assistant": ASSETS / "gemma3-270m-assistant" / "gemma3-270m-assistant-Q8_0.gguf",
}
DRAFTER_FOLDER = "assistant"  # where `paceline convert` puts a drafter, inside its target's folder
MAGIC = b"GGUF"
FORMS = "give a model folder, a GGUF, or a hub id such as org/name"


def _quiet(_: str) -> None:
    pass


def locate(model: str, notify: Callable[[str], None] = _quiet) -> Path:
    """The place of a model: a folder, or a GGUF file (of several shards, the first). What is not here is downloaded.

    A model is looked for in this order; the first that is there is taken.

    1. `tiny-python`, `tiny-python-assistant` and `gemma3-270m-assistant` always mean what comes with paceline, and
       `gemma3-270m` the model of another package (see `demo_model.path`); write `./tiny-python` for a folder.
    2. A prefix names another program's store: `ollama:gemma4:e2b`, `lmstudio:publisher/repository[/file]`,
       `llama.cpp:file` (its older, flat cache).
    3. A path: a GGUF, or a folder. A folder without safetensors is its GGUF; of several, the one of the tag
       (`folder:Q4_K_M`), else the largest that fits the memory at hand.
    4. `org/repository`, `org/repository:Q4_K_M` or `org/repository/file.gguf`, also as an address of the hub's: in the
       hub's cache (llama.cpp keeps its files there, too), in LM Studio's folders, in llama.cpp's older cache, on the
       hub. Safetensors are preferred unless a tag or file is given.
    5. The bare name of a GGUF in LM Studio's folders or llama.cpp's older cache.

    The folders of other programs are found as they find them: OLLAMA_MODELS, LLAMA_CACHE, HF_HUB_CACHE, HF_HOME,
    XDG_CACHE_HOME, `.lmstudio-home-pointer`. Ollama's blobs are GGUFs whose names do not end in `.gguf`.

    Args:
        model: the name.
        notify: told which of several files was chosen, and what was found in another program's folders.

    Raises:
        CheckpointError: no such model, no access to it, no network, a half download, or nothing that can be read.
    """
    return _locate(model, Wanted(notify))


def locate_drafter(model: str, place: Path, choice: str, notify: Callable[[str], None] = _quiet) -> Path | None:
    """The place of a target's drafter, or None.

    With "auto" a drafter is looked for beside its target:

    - of a folder: `assistant` in it, or the folder's name with "-assistant" appended;
    - of a GGUF: another GGUF in its folder, in a folder in that, or in the folder above, with "mtp" or "assistant" in
      its name (see `choose_drafter`); else a folder as above;
    - of Ollama's: what its manifest names as the draft;
    - of a hub id: the same in its repository, then the repository with "-assistant" in its name (for `org/name-GGUF`,
      `org/name-assistant-GGUF`, `org/name-assistant`, and `org/name-unquantized-assistant` if it is QAT).

    Args:
        model: the target as the user named it.
        place: where `locate` found it.
        choice: "none", "auto", or the drafter's name as `locate` takes it.
        notify: told what was found in another program's folders, and when names say that the pair does not belong
            together.

    Raises:
        CheckpointError: the drafter is not available. With "auto", None is returned if there is none or the hub cannot
            be reached; see also `unless_asked`.
    """
    if choice == "none":
        return None
    if choice == "auto" and model.startswith(OLLAMA):
        return ollama_file(model.removeprefix(OLLAMA), "draft")
    wanted = Wanted(notify, target=Path(os.path.abspath(place)).name)
    found = _locate(choice, wanted) if choice != "auto" else _find_drafter(model, place, wanted)
    if found and is_qat(f"{choice} {found}") != is_qat(f"{model} {place}"):
        notify(
            f"drafter: {found.name}: only one of the pair is named as QAT; drafts of its own drafter fit a model better"
        )
    return found


@contextlib.contextmanager
def unless_asked(choice: str, notify: Callable[[str], None]) -> Iterator[None]:
    """A drafter that nobody asked for and that cannot be had, read or paired ends the block with a notice.

    Args:
        choice: as for `locate_drafter`; what is wrong with a drafter that was asked for is raised.
        notify: told what is wrong with it.
    """
    try:
        yield
    except (CheckpointError, PairError) as error:
        if choice != "auto":
            raise
        notify(f"drafter: left out; {error}")


def _find_drafter(model: str, place: Path, wanted: Wanted) -> Path | None:
    if bundled := BUNDLED.get(model + hub.DRAFTER_SUFFIX):
        return bundled
    beside = _beside_file(place, wanted) if place.is_file() else _beside_folder(place, wanted)
    if beside or model in BUNDLED or _local(model):
        return beside
    name = hub.parse(model)
    return hub.find_drafter(name, place, wanted) if name else None


def is_qat(name: str) -> bool:
    return bool(re.search(r"(?<![a-z0-9])qat(?![a-z0-9])", name, re.IGNORECASE))


def _locate(model: str, wanted: Wanted) -> Path:
    if model == demo_model.NAME:
        return demo_model.path(wanted.notify)
    if model in BUNDLED:
        return BUNDLED[model]
    blob = ollama_file(model.removeprefix(OLLAMA)) if model.startswith(OLLAMA) else None
    if blob:
        return blob
    if model.startswith(local_stores.LLAMA_CPP):
        return local_stores.llama_cpp_path(model.removeprefix(local_stores.LLAMA_CPP))
    if model.startswith(local_stores.LM_STUDIO):
        name, _, tag = model.removeprefix(local_stores.LM_STUDIO).partition(":")
        return _given(local_stores.lm_studio_path(name), tag, wanted)
    local = _local(model)
    if local:
        return _given(*local, wanted)
    unfinished = next((half for end in local_stores.HALF_DOWNLOADS if (half := _path(model + end)).is_file()), None)
    if unfinished:
        raise local_stores.half_download(unfinished)
    hub_name = hub.parse(model)
    if hub_name:
        return hub.fetch(hub_name, wanted)
    elsewhere = local_stores.find_file(model) if fnmatch(model, "*.gguf") and "/" not in model else None
    if elsewhere:
        wanted.notify(f"model: {elsewhere}")
        return elsewhere
    raise CheckpointError(f"{model}: no such folder or file; {local_stores.suggestion(model)}{FORMS}")


def _local(model: str) -> tuple[Path, str] | None:
    """The path that is meant, and the tag after a folder's name; None if there is no such path."""
    path = _path(model)
    if os.path.lexists(path):
        return path, ""
    folder, _, tag = model.rpartition(":")
    return (_path(folder), tag) if folder and _path(folder).is_dir() else None


def _path(model: str) -> Path:
    try:
        path = Path(model).expanduser()
        path.exists()
    except PermissionError as error:
        raise CheckpointError(f"{model}: cannot be read ({error.strerror}); check who may read its folder") from error
    except (OSError, RuntimeError) as error:  # the name is too long, or the home folder does not exist
        raise CheckpointError(f"{model[:80]}: is not a valid folder name; {FORMS}") from error
    return path


def _given(path: Path, tag: str, wanted: Wanted) -> Path:
    """The place that a path means."""
    if path.is_dir():
        return _in_folder(path, tag, wanted)
    if not path.is_file():
        raise CheckpointError(f"{path}: is neither a folder nor a file; {FORMS}")
    if local_stores.is_half_download(path):
        raise local_stores.half_download(path)
    if path.suffix.lower() == ".gguf" or _magic(path) == MAGIC:
        return path
    raise CheckpointError(f"{path}: {foreign_file(path)}")


def _in_folder(folder: Path, tag: str, wanted: Wanted) -> Path:
    if not tag and (os.path.lexists(folder / PACKED_NAME) or any(folder.glob("*.safetensors"))):
        return folder
    sizes = local_stores.gguf_sizes(folder)
    chosen = wanted.choose(sizes, str(folder), tag)
    if chosen:
        return folder / chosen.name
    unfinished = next((path for path in sorted(folder.glob("*.gguf*")) if local_stores.is_half_download(path)), None)
    if unfinished:
        raise local_stores.half_download(unfinished)
    if sizes:
        raise wanted.none(sizes, str(folder), tag)
    if tag:
        raise CheckpointError(f"{folder}: has no GGUF, so none of format {tag}; give the folder alone")
    return folder


def _magic(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check who may read it") from error


def _beside_folder(folder: Path, wanted: Wanted) -> Path | None:
    sibling = Path(os.path.abspath(folder) + hub.DRAFTER_SUFFIX)  # abspath, so that "." has a name
    found = next((place for place in (folder / DRAFTER_FOLDER, sibling) if place.is_dir()), None)
    return _in_folder(found, "", wanted) if found else None


def _beside_file(target: Path, wanted: Wanted) -> Path | None:
    folder = Path(os.path.abspath(target)).parent  # not resolved: in the hub's cache files are links
    sizes = {f"{folder.name}/{name}": size for name, size in local_stores.gguf_sizes(folder).items()}
    sizes |= local_stores.gguf_sizes(folder.parent, folders="[Mm][Tt][Pp]")
    chosen = choose_drafter(sizes, f"{folder.name}/{target.name}")
    if chosen:
        return folder.parent / chosen.name
    stem = target.name.removesuffix(".gguf")
    for name in (stem, TAG.sub("", stem).strip("-_.")):
        if (folder / (name + hub.DRAFTER_SUFFIX)).is_dir():
            return _in_folder(folder / (name + hub.DRAFTER_SUFFIX), "", wanted)
    return _beside_folder(folder, wanted)
