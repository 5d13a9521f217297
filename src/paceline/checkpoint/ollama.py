"""Models that Ollama has pulled: from a name of its own to the files.

Sources of the layout: ollama/ollama, manifest/paths.go, manifest/layer.go, types/model/name.go and envconfig/config.go.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from paceline.checkpoint.folders import children, home, without_case
from paceline.errors import CheckpointError
from paceline.files import read_json

OLLAMA = "ollama:"
# where Ollama keeps models when it runs as a service: its installer's, and those of distributions
SERVICES = ("/usr/share/ollama/.ollama/models", "/var/lib/ollama", "/var/lib/ollama/models")
NAME = re.compile(
    r"(?:(?P<host>[A-Za-z0-9_][\w.-]{0,349}(?::\d{1,5})?)/(?=[^/]+/))?"
    r"(?:(?P<namespace>[A-Za-z0-9_][\w.-]{0,79})/)?"
    r"(?P<model>[A-Za-z0-9_][\w.-]{0,79})(?::(?P<tag>[A-Za-z0-9_][\w.-]{0,79}))?",
    re.ASCII,
)
DIGEST = re.compile(r"sha256[:-]([0-9a-fA-F]{64})")
MEDIA_TYPE = "application/vnd.ollama.image."


def ollama_file(name: str, kind: str = "model") -> Path | None:
    """The GGUF of a model by Ollama's name for it, such as `gemma4:e2b` or `hf.co/user/repo:tag`.

    Args:
        name: the name, without `ollama:`; without a tag, `latest`.
        kind: "model", or "draft" for the drafter that comes with it.

    Returns:
        A file below `blobs`, whose name is its digest; None if the model has no drafter.

    Raises:
        CheckpointError: Ollama has no such model here, it is not whole, it may not be read, or it is of a kind that
            cannot be loaded.
    """
    parts = NAME.fullmatch(name)
    if not parts:
        raise CheckpointError(f"{OLLAMA}{name}: is not a name of Ollama's; give one such as {OLLAMA}gemma4:e2b")
    wanted = (
        parts["host"] or "registry.ollama.ai",
        parts["namespace"] or "library",
        parts["model"],
        parts["tag"] or "latest",
    )
    closed = None
    for root in _roots():
        try:
            manifest = without_case(root / "manifests", wanted)
        except OSError as error:
            closed = error
            continue
        if manifest:
            return _file(root, manifest, name, kind)
    if closed:
        raise _unreadable(Path(str(closed.filename)), closed) from closed
    near = [name.removeprefix(OLLAMA) for name in ollama_names() if parts["model"].lower() in name.lower()]
    has = f"Ollama has {', '.join(sorted(near)[:8])} here; or" if near else "Ollama has no such model here;"
    raise CheckpointError(f"{OLLAMA}{name}: not found; {has} run `ollama pull {name}`")


def _roots() -> list[Path]:
    given = os.environ.get("OLLAMA_MODELS")
    if given:
        return [Path(given)]
    return [*([user / ".ollama" / "models"] if (user := home()) else []), *map(Path, SERVICES)]


def _file(root: Path, manifest: Path, name: str, kind: str) -> Path | None:
    """The file of a kind that a manifest lists. It is a download: nothing in it is trusted."""
    try:
        if manifest.is_file():
            manifest.open("rb").close()
    except OSError as error:
        raise _unreadable(manifest, error) from error
    try:
        layers = read_json(manifest).get("layers")
        if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
            raise CheckpointError("no layers")
    except CheckpointError as error:
        raise CheckpointError(f"{manifest}: is damaged; run `ollama pull {name}`") from error
    kinds: dict[str, list[dict[str, Any]]] = {}
    for layer in layers:
        kinds.setdefault(str(layer.get("mediaType")).removeprefix(MEDIA_TYPE), []).append(layer)
    if "tensor" in kinds:
        raise CheckpointError(
            f"{OLLAMA}{name}: holds MLX tensors, for Apple's GPUs, which cannot be read; pull a tag that is a GGUF"
        )
    if "adapter" in kinds:
        raise CheckpointError(
            f"{OLLAMA}{name}: is an adapter (LoRA) on another model, which cannot be applied; merge it into the model"
        )
    found = kinds.get(kind, [])
    if len(found) > 1:
        raise CheckpointError(f"{OLLAMA}{name}: is in {len(found)} parts, which cannot be read; give it as one file")
    if not found and kind == "model":
        raise CheckpointError(f"{OLLAMA}{name}: its manifest lists no model file; run `ollama pull {name}`")
    return _blob(root, found[0], manifest, name) if found else None


def _blob(root: Path, layer: dict[str, Any], manifest: Path, name: str) -> Path:
    digest = DIGEST.fullmatch(str(layer.get("digest")))
    if not digest:
        raise CheckpointError(f"{manifest}: names a file by no digest; run `ollama pull {name}`")
    path = root / "blobs" / f"sha256-{digest[1].lower()}"
    try:
        found = path.stat()
        regular = stat.S_ISREG(found.st_mode)
        if regular:
            path.open("rb").close()
    except FileNotFoundError:
        if os.path.lexists(f"{path}-partial"):
            raise CheckpointError(
                f"{OLLAMA}{name}: its download has not finished ({path.name}-partial); run `ollama pull {name}`"
            ) from None
        raise CheckpointError(f"{path}: is missing; run `ollama pull {name}`") from None
    except OSError as error:
        raise _unreadable(path, error) from error
    size = layer.get("size")
    if not regular or (type(size) is int and size != found.st_size):
        raise CheckpointError(
            f"{path}: has {found.st_size} bytes but its manifest says {size}; run `ollama rm {name}` and pull again"
        )
    return path


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    if isinstance(error, PermissionError):
        return CheckpointError(
            f"{path}: may not be read by this user (permission denied); Ollama's service keeps its models as a user of "
            "its own: join its group (sudo usermod -aG ollama $USER, then log in again), or pull the model as yourself"
        )
    return CheckpointError(f"{path}: cannot be read ({error.strerror})")


def ollama_names() -> Iterator[str]:
    """The names of the models that Ollama has pulled, with the prefix and the tag."""
    for root in _roots():
        for path in children(root / "manifests", 4):
            host, namespace, model, tag = path.parts[-4:]
            official = host == "registry.ollama.ai"
            prefix = (
                "" if official and namespace == "library" else f"{namespace}/" if official else f"{host}/{namespace}/"
            )
            yield f"{OLLAMA}{prefix}{model}:{tag}"
