"""Models that other programs keep on this machine: LM Studio, llama.cpp, the hub's client; Ollama's are in `ollama`.

Nothing here reaches the network or writes. Sources of the layouts: LM Studio's lms; llama.cpp's common/hf-cache.cpp and
common/common.cpp; huggingface_hub's constants.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from paceline.checkpoint.folders import children, home, without_case
from paceline.checkpoint.ollama import OLLAMA, ollama_names
from paceline.errors import MAX_REASON, CheckpointError, shorten
from paceline.files import read_json

LM_STUDIO = "lmstudio:"
LLAMA_CPP = "llama.cpp:"
COMMIT = re.compile(r"[0-9a-f]{40}")
MOST_NAMES = 10_000  # local models that a message's suggestion is looked for among
HALF_DOWNLOADS = (".downloadInProgress", ".incomplete", "-partial", ".part", ".partial", ".crdownload", ".aria2")


def lm_studio_path(name: str) -> Path:
    """The folder or file of `publisher/repository` or `publisher/repository/file` in LM Studio's models folder.

    Raises:
        CheckpointError: there is none.
    """
    root = _lm_studio_models()
    parts = name.split("/")
    if len(parts) >= 2 and not {"", ".", ".."} & set(parts):
        with contextlib.suppress(OSError, ValueError):
            path = without_case(root, tuple(parts))
            if path:
                return path
    given = shorten(name, MAX_REASON)
    raise CheckpointError(
        f"{LM_STUDIO}{given}: no such model in {root}; give {LM_STUDIO}publisher/repository as its folders are named"
    )


def llama_cpp_path(name: str) -> Path:
    """A file of llama.cpp's older cache, by its name there: `organisation_repository_file.gguf`.

    Raises:
        CheckpointError: there is none.
    """
    folder = _llama_cpp_cache()
    path = folder / name
    if os.path.basename(name) == name and os.path.isfile(path):
        return path
    if os.path.isfile(f"{path}.downloadInProgress"):
        raise half_download(Path(f"{path}.downloadInProgress"))
    given = shorten(name, MAX_REASON)
    raise CheckpointError(
        f"{LLAMA_CPP}{given}: no such file in {folder}; newer versions of llama.cpp keep files in the hub's cache, "
        "where they are found as org/repository/file.gguf"
    )


def repository_folders(repository: str) -> Iterator[tuple[Path, str, str]]:
    """Where files of a repository of the hub may lie on this machine, the hub's own cache first.

    Yields:
        A folder, what the names of the repository's files begin with there, and whose folder it is; "" is the hub's.
    """
    for cache in _hub_caches():
        snapshot = _snapshot(cache, repository)
        if snapshot:
            yield snapshot, "", ""
    with contextlib.suppress(OSError):
        folder = without_case(_lm_studio_models(), tuple(repository.split("/")))
        if folder and folder.is_dir():
            yield folder, "", "LM Studio"
    if os.path.isdir(_llama_cpp_cache()):
        yield _llama_cpp_cache(), repository.replace("/", "_") + "_", "llama.cpp"


def is_partly_cached(repository: str) -> bool:
    """Whether the hub's cache has something of a repository: a download was interrupted, or was of another file."""
    return any(os.path.isdir(_cached_repository(cache, repository) / "blobs") for cache in _hub_caches())


def find_file(name: str) -> Path | None:
    """A GGUF by its bare file name, in LM Studio's folders or llama.cpp's older cache; the hub's cache by ids only."""
    with contextlib.suppress(OSError, ValueError):
        cached = _llama_cpp_cache() / name
        found = [cached] if cached.is_file() else []
        found += [path for folder in children(_lm_studio_models(), 2) if (path := folder / name).is_file()]
        return min(found, default=None)
    return None


def local_names() -> list[str]:
    """Names that mean models of this machine: `org/name`, `ollama:name:tag`, `lmstudio:publisher/repository`."""
    names = [*ollama_names()]
    for cache in _hub_caches():
        folders = [path.name for path in children(cache, 1) if path.name.startswith("models--")]
        names += [name.removeprefix("models--").replace("--", "/") for name in folders]
    names += [LM_STUDIO + "/".join(path.parts[-2:]) for path in children(_lm_studio_models(), 2)]
    return names[:MOST_NAMES]


def suggestion(model: str) -> str:
    """For a message: a question after the model of this machine whose name is nearest, or nothing."""
    names = local_names()
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        names += [str(path) for path in Path(model).expanduser().parent.iterdir()]
    near = {name.lower(): name for name in names if name.lower() != model.lower()}
    near |= {name.partition(":")[2]: near[name] for name in list(near) if name.startswith((OLLAMA, LM_STUDIO))}
    found = difflib.get_close_matches(model.lower(), near, n=1, cutoff=0.75)
    return f"did you mean {near[found[0]]}? Otherwise " if found else ""


def gguf_sizes(folder: Path, begins: str = "", folders: str = "*") -> dict[str, int]:
    """Bytes of the GGUFs of a folder and of the folders in it.

    Args:
        folder: the folder.
        begins: only files whose name begins so; it is left out of the names that are returned.
        folders: a pattern of the folders in it.
    """
    sizes: dict[str, int] = {}
    for path in (*folder.glob("*.gguf"), *folder.glob(f"{folders}/*.gguf")):
        name = path.relative_to(folder).as_posix()
        if name.startswith(begins):
            with contextlib.suppress(OSError):  # a link to nothing
                sizes[name.removeprefix(begins)] = path.stat().st_size
    return sizes


def is_half_download(path: Path) -> bool:
    """Whether a file's name says that its download is under way or was interrupted."""
    return path.name.endswith(HALF_DOWNLOADS) or bool(re.search(r"-partial-\d+$", path.name))


def half_download(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path}: is a download that has not finished; let the program that began it end, or start it again"
    )


def _lm_studio_models() -> Path:
    """LM Studio's folder of models: what its settings say, or `models` in its home."""
    user = home() or Path("/nonexistent")
    studio = user / ".lmstudio"
    with contextlib.suppress(OSError, ValueError):
        pointed = Path((user / ".lmstudio-home-pointer").read_bytes()[:4096].decode().strip())
        studio = pointed if pointed.is_absolute() else studio
    if not os.path.isdir(studio):
        studio = user / ".cache" / "lm-studio"
    with contextlib.suppress(CheckpointError):
        folder = read_json(studio / "settings.json").get("downloadsFolder")
        if isinstance(folder, str) and os.path.isdir(folder):
            return Path(folder)
    return studio / "models"


def _llama_cpp_cache() -> Path:
    given = os.environ.get("LLAMA_CACHE")
    if given:
        return Path(given)
    user = home() or Path("/nonexistent")
    if sys.platform == "darwin":
        return user / "Library" / "Caches" / "llama.cpp"
    return Path(os.environ.get("XDG_CACHE_HOME") or user / ".cache") / "llama.cpp"


def _hub_caches() -> list[Path]:
    """The cache of the hub's client, found as its own constants.py does (whose import takes 0.2 s), and llama.cpp's."""
    given = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    caches = Path(os.environ.get("XDG_CACHE_HOME") or (home() or Path("/nonexistent")) / ".cache")
    hub = Path(given) if given else Path(os.environ.get("HF_HOME") or caches / "huggingface") / "hub"
    llama = os.environ.get("LLAMA_CACHE")
    return [
        Path(os.path.expanduser(os.path.expandvars(path)))
        for path in dict.fromkeys([hub, *([Path(llama)] if llama else [])])
    ]


def _cached_repository(cache: Path, repository: str) -> Path:
    return cache / f"models--{repository.replace('/', '--')}"


def _snapshot(cache: Path, repository: str) -> Path | None:
    """The folder of a cached repository's newest commit."""
    folder = _cached_repository(cache, repository)
    try:
        commit = (folder / "refs" / "main").read_bytes()[:64].decode().strip()
    except (OSError, ValueError):
        return None
    snapshot = folder / "snapshots" / commit
    return snapshot if COMMIT.fullmatch(commit) and os.path.isdir(snapshot) else None
