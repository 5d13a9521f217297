"""Where a model is found. No test reaches the network: the cache is written by hand, the download is a stand-in."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

import paceline.errors
from paceline.checkpoint import locate, locate_drafter
from paceline.errors import CheckpointError
from tests.fixtures.checkpoints import TARGET, target_weights, write, write_drafter, write_target

ID = "org/gemma-tiny"


def cache(home: Path, repository: str, fill: Callable[[Path], object]) -> Path:
    """A repository as the hub's client leaves it in its cache."""
    folder = home / "hub" / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    fill(snapshot)
    return snapshot


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path | Exception]:
    """A pretended hub: what a download of each id gives. Nothing is in the cache; unknown ids do not exist."""
    content: dict[str, Path | Exception] = {}

    def snapshot_download(repository: str, *, allow_patterns: list[str], local_files_only: bool = False) -> str:
        assert "config.json" in allow_patterns
        if local_files_only:
            raise LocalEntryNotFoundError("not in the cache")
        answer = content.get(repository, _http(RepositoryNotFoundError, 404))
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    return content


def _http(kind: type[huggingface_hub.errors.HfHubHTTPError], status: int) -> Exception:
    return kind("many\nlines", response=httpx.Response(status, request=httpx.Request("GET", "https://hub")))


def refused(model: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        locate(model)
    message = str(caught.value)
    assert "\n" not in message
    assert model[:80] in message
    return message


def test_local_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert locate("a/b").samefile(tmp_path / "a" / "b")  # though it could be a hub id
    assert locate(str(tmp_path)) == tmp_path
    (tmp_path / "a" / "file.gguf").touch()
    assert "is a file" in refused("a/file.gguf")


@pytest.mark.parametrize("model", ["nowhere", "./no/where", "/no/where", "a/b/c", "x" * 5000, "a\0b", "~nobody/x"])
def test_names_that_are_neither(model: str, hub: object) -> None:
    refused(model)


def test_the_bundled_pair(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tiny-python").mkdir()
    monkeypatch.chdir(tmp_path)
    assets = Path(paceline.errors.__file__).parent / "assets"
    assert locate("tiny-python") == assets / "tiny-python"
    assert locate("tiny-python-assistant") == assets / "tiny-python-assistant"
    assert locate("./tiny-python").samefile(tmp_path / "tiny-python")


def test_download(hub: dict[str, Path | Exception], tmp_path: Path) -> None:
    hub[ID] = tmp_path / "snapshot"
    assert locate(ID) == tmp_path / "snapshot"


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (_http(RepositoryNotFoundError, 404), "no such repository"),
        (_http(GatedRepoError, 403), "is gated"),
        (LocalEntryNotFoundError("many\nlines"), "cannot be reached"),
        (httpx.ProxyError("refused"), "cannot be reached"),
        (OSError(28, "No space left on device"), "No space left"),
        (RuntimeError(""), "RuntimeError"),
    ],
)
def test_download_errors(hub: dict[str, Path | Exception], answer: Exception, says: str) -> None:
    hub[ID] = answer
    assert says in refused(ID)


def test_drafter_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, drafter = tmp_path / "m", tmp_path / "m-assistant"
    model.mkdir()
    assert locate_drafter(str(model), model, "auto") is None
    drafter.mkdir()
    assert locate_drafter(str(model), model, "auto") == drafter
    assert locate_drafter(str(model) + "/", model, "auto") == drafter
    monkeypatch.chdir(model)
    assert locate_drafter(".", Path("."), "auto") == drafter
    assert locate_drafter(str(model), model, "none") is None
    assert locate_drafter(str(model), model, str(tmp_path)) == tmp_path
    with pytest.raises(CheckpointError, match="no such folder"):
        locate_drafter(str(model), model, "./absent")


def test_drafter_of_a_hub_id(hub: dict[str, Path | Exception], tmp_path: Path) -> None:
    assert locate_drafter(ID, tmp_path, "auto") is None  # the hub has none
    hub[ID + "-assistant"] = LocalEntryNotFoundError("no network")
    assert locate_drafter(ID, tmp_path, "auto") is None
    hub[ID + "-assistant"] = tmp_path / "drafter"
    assert locate_drafter(ID, tmp_path, "auto") == tmp_path / "drafter"
    hub[ID + "-assistant"] = OSError(28, "No space left on device")
    with pytest.raises(CheckpointError, match="No space"):  # not the same as having none
        locate_drafter(ID, tmp_path, "auto")
    with pytest.raises(CheckpointError, match="no such repository"):
        locate_drafter(ID, tmp_path, "org/absent")


def offline(home: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run code with the real client of the hub, its cache in `home`, and no network."""
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    code = "from paceline.checkpoint import *; from paceline.errors import *\n" + code
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_offline_when_cached(tmp_path: Path) -> None:
    target = cache(tmp_path, ID, write_target)
    drafter = cache(tmp_path, ID + "-assistant", write_drafter)
    code = f"folder = locate('{ID}'); print(folder); print(locate_drafter('{ID}', folder, 'auto'))"
    done = offline(tmp_path, code)
    assert done.stdout.split() == [str(target), str(drafter)], done.stderr


def test_half_a_download_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "half", TARGET, target_weights(), shards=2)
    (tmp_path / "half" / "model-00002-of-00002.safetensors").unlink()
    write_target(tmp_path / "whole")

    def snapshot_download(_: str, *, local_files_only: bool = False, **__: object) -> str:
        return str(tmp_path / ("half" if local_files_only else "whole"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert locate(ID) == tmp_path / "whole"
    shutil.rmtree(tmp_path / "half")
    write_target(tmp_path / "half")
    assert locate(ID) == tmp_path / "half"  # now there is nothing left to fetch


def test_offline_with_half_a_download(tmp_path: Path) -> None:
    def interrupted(folder: Path) -> None:
        write(folder, TARGET, target_weights(), shards=2)
        (folder / "model-00002-of-00002.safetensors").unlink()

    cache(tmp_path, ID, interrupted)
    code = f"try: Checkpoint.open(locate('{ID}'))\nexcept CheckpointError as error: print(error)"
    done = offline(tmp_path, code)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert "model-00002-of-00002.safetensors: this shard is missing" in done.stdout
