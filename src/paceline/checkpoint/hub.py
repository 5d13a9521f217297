"""Models on Hugging Face's hub: their names, what of them is on this machine already, and downloads."""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from paceline.checkpoint import local_stores
from paceline.checkpoint.checkpoint import shard_names
from paceline.checkpoint.choice import GgufFile, Wanted, choose_drafter, gguf_files
from paceline.checkpoint.foreign import foreign_config, foreign_listing
from paceline.errors import CheckpointError
from paceline.files import read_json

DRAFTER_SUFFIX = "-assistant"
NEEDED_FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
SITE = re.compile(r"(?:https?://)?(?:www\.)?(?:hf\.co|huggingface\.co)/", re.IGNORECASE)
PAGE = re.compile(r"(?P<repository>[^/]+/[^/]+)/(?:blob|resolve|tree)/(?P<revision>[^/]+)(?P<file>/.+)?")
NAME = re.compile(
    r"(?P<repository>[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*)"
    r"(?::(?P<tag>\w[\w.-]*)|/(?P<file>(?:\w[\w.-]*/){0,8}\w[\w.+-]*\.gguf))?"
)
# errors of libraries below the hub's client when there is no network
UNREACHABLE = ("ProxyError", "ConnectError", "ConnectTimeout", "ReadTimeout", "OfflineModeIsEnabled")


class Unavailable(CheckpointError):
    """The hub has no such repository, it is private, or it is not in the cache and the hub cannot be reached."""


class Unreachable(Unavailable):
    """The hub cannot be reached."""


@dataclass(frozen=True)
class HubName:
    """What is meant on the hub: a repository, and which of its GGUFs."""

    repository: str
    tag: str = ""
    file: str = ""


def parse(model: str) -> HubName | None:
    """What `org/name`, `org/name:tag`, `org/name/file.gguf` or an address of the hub's means; None if it is neither.

    Raises:
        CheckpointError: an address of something else on the hub.
    """
    site = SITE.match(model)
    name = model[site.end() :].partition("?")[0].rstrip("/") if site else model
    page = PAGE.fullmatch(name) if site else None
    found = NAME.fullmatch(page["repository"] + (page["file"] or "") if page else name)
    if site and (not found or (page and page["revision"] != "main")):
        raise CheckpointError(f"{model}: is no model or GGUF of a main branch; give org/name or org/name/file.gguf")
    if not found:
        return None
    tag = found["tag"] or ""
    return HubName(found["repository"], "" if tag == "latest" else tag, found["file"] or "")


def fetch(name: HubName, wanted: Wanted) -> Path:
    """The place of a model of the hub, downloaded unless it is on this machine."""
    return _cached(name, wanted) or _download(name, wanted)


def find_drafter(name: HubName, target: Path, wanted: Wanted) -> Path | None:
    """The drafter of a target on the hub, or None if there is none or the hub cannot be reached.

    Args:
        name: the target's.
        target: its place on this machine; there is no drafter beside it.
        wanted: how to choose among GGUFs.
    """
    base = re.sub(r"-gguf$", "", name.repository, flags=re.IGNORECASE)
    ends = [DRAFTER_SUFFIX]
    if base != name.repository:
        ends.insert(0, f"{DRAFTER_SUFFIX}-GGUF")
    if base != name.repository and "qat" in base.lower().split("-"):
        ends.append(f"-unquantized{DRAFTER_SUFFIX}")  # Google's, for its own GGUFs
    names = [HubName(base + end) for end in ends]
    cached = next((found for one in names if (found := _cached(one, wanted))), None)
    if cached:
        return cached
    try:
        sibling = _download_sibling(name.repository, target) if target.is_file() else None
        if sibling:
            return sibling
        for one in names:
            try:
                return _download(one, wanted)
            except Unreachable:
                raise
            except Unavailable:
                continue
    except Unavailable:
        pass
    return None


def _cached(name: HubName, wanted: Wanted) -> Path | None:
    """What is on this machine of what is meant on the hub."""
    whole = None if name.tag or name.file else _cached_snapshot(name.repository)
    if whole:
        return whole
    for folder, begins, whose in local_stores.repository_folders(name.repository):
        sizes = local_stores.gguf_sizes(folder, begins)
        files = [file for file in gguf_files(sizes) if file.whole]
        if name.file:
            chosen = name.file if any(name.file in file.names for file in files) else None
        else:
            found = wanted.choose(
                {part: sizes[part] for file in files for part in file.names}, name.repository, name.tag
            )
            chosen = found.name if found else None
        if chosen:
            if whose:
                wanted.notify(f"model: {folder / (begins + chosen)}, found in the folders of {whose}")
            return folder / (begins + chosen)
    return None


def _cached_snapshot(repository: str) -> Path | None:
    """The cached snapshot of safetensors if it is complete; an interrupted download leaves a partial one."""
    # imported here because it takes 0.2 s
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repository, allow_patterns=list(NEEDED_FILES), local_files_only=True))
        whole = (folder / "config.json").exists() and all((folder / name).exists() for name in shard_names(folder))
    except (LocalEntryNotFoundError, HFValidationError, CheckpointError):
        return None
    return folder if whole else None


def _download(name: HubName, wanted: Wanted) -> Path:
    """Download what is needed of a repository to the hub's cache, with progress bars on stderr."""
    sizes = _listing(name.repository)
    if not (name.tag or name.file) and any(fnmatch(file, "model*.safetensors") for file in sizes):
        config = _fetch(name.repository, ["config.json"]) / "config.json"
        foreign = config.is_file() and foreign_config(read_json(config))  # before gigabytes are fetched
        if foreign:
            raise CheckpointError(f"{name.repository}: {foreign}")
        return _fetch(name.repository, list(NEEDED_FILES))
    ggufs = {file: size for file, size in sizes.items() if fnmatch(file, "*.gguf")}
    if name.file:
        chosen = next((file for file in gguf_files(ggufs) if name.file in file.names), None)
    else:
        chosen = wanted.choose(ggufs, name.repository, name.tag)
    if chosen:
        return _fetch_gguf(name.repository, chosen, name.file or chosen.name)
    raise _nothing_chosen(name, sizes, ggufs, wanted)


def _nothing_chosen(
    name: HubName, sizes: Mapping[str, int], ggufs: Mapping[str, int], wanted: Wanted
) -> CheckpointError:
    if name.file:
        near = difflib.get_close_matches(name.file, ggufs, n=3, cutoff=0)
        return CheckpointError(f"{name.repository}: has no {name.file}; it has {', '.join(near) or 'no GGUF'}")
    if ggufs:
        return wanted.none(ggufs, name.repository, name.tag)
    if name.tag:
        return CheckpointError(f"{name.repository}: has no GGUF, so none of format {name.tag}; give {name.repository}")
    foreign = foreign_listing(sizes) or "has no weights that can be read; give a repository of safetensors or GGUF"
    return CheckpointError(f"{name.repository}: {foreign}")


def _download_sibling(repository: str, target: Path) -> Path | None:
    """The drafter in the repository of a GGUF."""
    sizes = _listing(repository)
    name = next((file for file in sizes if file.rpartition("/")[2] == target.name), target.name)
    sibling = choose_drafter(sizes, name)
    return _fetch_gguf(repository, sibling, sibling.name) if sibling else None


def _fetch_gguf(repository: str, chosen: GgufFile, name: str) -> Path:
    folder = _fetch(repository, [re.sub(r"([*?[])", r"[\1]", part) for part in chosen.names])
    missing = next((part for part in chosen.names if not (folder / part).is_file()), None)
    if missing:
        raise Unavailable(f"{repository}: {missing} was not downloaded; run the command again to resume")
    return folder / name


def _listing(repository: str) -> dict[str, int]:
    """Bytes of a repository's files by name."""
    from huggingface_hub import model_info

    with _hub_errors(repository):
        return {file.rfilename: file.size or 0 for file in model_info(repository, files_metadata=True).siblings or ()}


def _fetch(repository: str, patterns: list[str]) -> Path:
    """The folder of a repository's snapshot, once the files of these patterns are in it."""
    from huggingface_hub import snapshot_download

    with _hub_errors(repository):
        return Path(snapshot_download(repository, allow_patterns=patterns))


@contextlib.contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    """Turn what the hub's client raises into one line."""
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        yield
    except GatedRepoError as error:
        raise CheckpointError(
            f"{repository}: is gated; accept its licence on huggingface.co/{repository} and run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise Unavailable(
            f"{repository}: no such folder here and no such repository on the hub; "
            f"{local_stores.suggestion(repository)}check the name, or run `hf auth login` if it is private"
        ) from error
    except Exception as error:  # the hub client raises many types of several libraries
        if isinstance(error, LocalEntryNotFoundError) or type(error).__name__ in UNREACHABLE:
            partly = local_stores.is_partly_cached(repository)
            where = "only partly in the hub's cache" if partly else "not in the hub's cache"
            raise Unreachable(
                f"{repository}: no such folder here, {where}, and the hub cannot be reached; "
                f"{local_stores.suggestion(repository)}check the network, or give a local folder"
            ) from error
        first_line = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"{repository}: the download failed ({type(error).__name__}: {first_line}); run the command again to resume"
        ) from error
