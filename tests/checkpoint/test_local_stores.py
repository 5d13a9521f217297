"""The folders of Ollama, LM Studio and llama.cpp, written by hand as those programs leave them."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from paceline.checkpoint import locate, locate_drafter, ollama
from paceline.checkpoint.ollama import ollama_file
from paceline.errors import CheckpointError
from tests.fixtures.model_stores import Hub, cache, files, hide_local_models

HEX = "0123456789abcdef" * 4


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with nothing in it, and a hub without models."""
    Hub(tmp_path, monkeypatch)
    return hide_local_models(tmp_path, monkeypatch)


def refused(model: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        locate(model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def layer(kind: str, digest: str = HEX, size: int = 4) -> dict[str, Any]:
    return {"mediaType": f"application/vnd.ollama.image.{kind}", "digest": f"sha256:{digest}", "size": size}


def pulled(root: Path, name: str, *layers: object, blobs: bool = True) -> Path:
    """A model as Ollama keeps it; returns its manifest."""
    manifest = root / "manifests" / name
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))
    for one in layers if blobs else ():
        assert isinstance(one, dict)
        files(f"blobs/{one['digest'].replace(':', '-')}")(root)
    return manifest


def test_ollama(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root = home / ".ollama" / "models"
    pulled(root, "registry.ollama.ai/library/gemma4/e2b", layer("template", "1" * 64), layer("model"))
    blob = root / "blobs" / f"sha256-{HEX}"
    assert locate("ollama:gemma4:e2b") == blob
    assert locate("ollama:Gemma4:E2B") == blob  # Ollama's names have no case
    assert locate("ollama:library/gemma4:e2b") == blob
    assert locate("ollama:registry.ollama.ai/library/gemma4:e2b") == blob
    assert locate_drafter("ollama:gemma4:e2b", blob, "auto") is None
    message = refused("ollama:gemma4")  # means latest
    assert "Ollama has gemma4:e2b here" in message
    assert "ollama pull gemma4" in message
    pulled(root, "registry.ollama.ai/library/gemma4/latest", layer("model", "2" * 64))
    assert locate("ollama:gemma4").name == "sha256-" + "2" * 64
    pulled(root, "hf.co/user/Repo-GGUF/Q4_K_M", layer("model", "3" * 64))
    assert locate("ollama:hf.co/user/Repo-GGUF:Q4_K_M").name == "sha256-" + "3" * 64
    pulled(root, "registry.ollama.ai/user/mine/latest", layer("model", "4" * 64))
    assert locate("ollama:user/mine").name == "sha256-" + "4" * 64
    other = tmp_path / "other"
    pulled(other, "registry.ollama.ai/library/gemma4/e2b", layer("model", "5" * 64))
    monkeypatch.setenv("OLLAMA_MODELS", str(other))
    assert locate("ollama:gemma4:e2b") == other / "blobs" / ("sha256-" + "5" * 64)


def test_ollama_as_a_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ollama, "SERVICES", (str(tmp_path / "none"), str(tmp_path / "service")))
    pulled(tmp_path / "service", "registry.ollama.ai/library/gemma4/e2b", layer("model"))
    assert locate("ollama:gemma4:e2b") == tmp_path / "service" / "blobs" / f"sha256-{HEX}"


def test_ollama_drafter(home: Path) -> None:
    root = home / ".ollama" / "models"
    manifest = pulled(root, "registry.ollama.ai/library/m/latest", layer("model"), layer("draft", "d" * 64))
    target = locate("ollama:m")
    drafter = root / "blobs" / ("sha256-" + "d" * 64)
    assert locate_drafter("ollama:m", target, "auto") == drafter
    assert locate_drafter("ollama:m", target, "none") is None
    drafter.unlink()
    assert locate("ollama:m") == target  # whatever is wrong with the drafter
    with pytest.raises(CheckpointError, match="is missing"):
        locate_drafter("ollama:m", target, "auto")
    manifest.unlink()
    with pytest.raises(CheckpointError, match="ollama pull m"):
        locate_drafter("ollama:m", target, "auto")


@pytest.mark.parametrize(
    "name",
    ["", "..", "../x", "a/../b", "a/b/c/d", "a:b:c", "a/b:../c", "/etc/passwd", "x" * 81, "a b", "a\n", "-a", "a:"],
)
def test_ollama_names_that_are_none(name: str) -> None:
    assert "is not a name of Ollama's" in refused("ollama:" + name)


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ([layer("projector")], "lists no model file"),
        ([], "lists no model file"),
        ([layer("model"), layer("adapter", "1" * 64)], "is an adapter"),
        ([layer("tensor"), layer("tensor")], "MLX tensors"),
        ([layer("model"), layer("model", "1" * 64)], "is in 2 parts"),
        ([layer("model", size=5)], "has 4 bytes but its manifest says 5"),
        ([layer("model", "../../../etc/passwd")], "names a file by no digest"),
        ([layer("model", HEX + "/..")], "names a file by no digest"),
        ([layer("model", HEX + "\n")], "names a file by no digest"),
        ([{"mediaType": "application/vnd.ollama.image.model"}], "names a file by no digest"),
        ([layer("model", "e" * 64)], "is missing; run `ollama pull m`"),
        (["text"], "is damaged"),
        ("text", "is damaged"),
        (None, "is damaged"),
    ],
)
def test_manifests_that_cannot_be_used(home: Path, layers: Any, says: str) -> None:
    root = home / ".ollama" / "models"
    manifest = pulled(root, "registry.ollama.ai/library/m/latest")
    manifest.write_text(json.dumps({"layers": layers}))
    files(f"blobs/sha256-{HEX}", "blobs/sha256-" + "1" * 64)(root)
    assert says in refused("ollama:m")


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000, "{}", "\udcff"])
def test_damaged_manifests(home: Path, content: str) -> None:
    manifest = pulled(home / ".ollama" / "models", "registry.ollama.ai/library/m/latest")
    manifest.write_bytes(content.encode(errors="surrogateescape"))
    assert "is damaged; run `ollama pull m`" in refused("ollama:m")


def test_special_files_of_ollama(home: Path) -> None:
    root = home / ".ollama" / "models"
    manifest = pulled(root, "registry.ollama.ai/library/m/latest", layer("model"), blobs=False)
    (root / "blobs").mkdir()
    os.mkfifo(root / "blobs" / f"sha256-{HEX}")
    assert "has 0 bytes" in refused("ollama:m")  # a pipe is not opened: it would never end
    manifest.unlink()
    os.mkfifo(manifest)
    assert "is damaged" in refused("ollama:m")
    manifest.unlink()
    manifest.mkdir()
    assert "is damaged" in refused("ollama:m")


def test_a_pull_under_way(home: Path) -> None:
    root = home / ".ollama" / "models"
    pulled(root, "registry.ollama.ai/library/m/latest", layer("model"), blobs=False)
    files(f"blobs/sha256-{HEX}-partial", f"blobs/sha256-{HEX}-partial-0")(root)
    assert "its download has not finished" in refused("ollama:m")
    assert "is a download that has not finished" in refused(str(root / "blobs" / f"sha256-{HEX}-partial-0"))


@contextlib.contextmanager
def without_rights() -> Iterator[None]:
    """As a user who owns nothing."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize(
    "closed",
    [
        "manifests/registry.ollama.ai",
        "manifests/registry.ollama.ai/library/m/latest",
        "blobs",
        f"blobs/sha256-{HEX}",
    ],
)
def test_ollama_of_another_user(monkeypatch: pytest.MonkeyPatch, closed: str) -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to others
        os.chmod(folder, 0o755)
        root = Path(folder) / "models"
        pulled(root, "registry.ollama.ai/library/m/latest", layer("model"))
        monkeypatch.setattr(ollama, "SERVICES", (str(root),))
        monkeypatch.setenv("HOME", folder)
        os.chmod(root / closed, 0)
        try:
            with without_rights():
                message = refused("ollama:m")
        finally:
            os.chmod(root / closed, 0o755)
        assert "may not be read by this user (permission denied)" in message
        assert "usermod -aG ollama" in message
        assert closed in message


def test_lm_studio(home: Path, tmp_path: Path) -> None:
    old, new, moved = home / ".cache" / "lm-studio", home / ".lmstudio", tmp_path / "moved"
    name = "models/org/Gemma-GGUF/gemma-Q4_0.gguf"
    files(name)(old)
    assert locate("lmstudio:org/Gemma-GGUF") == old / name
    files(name, "models/org/Gemma-GGUF/gemma-Q8_0.gguf", "models/org/Gemma-GGUF/mtp-gemma.gguf")(new)
    assert locate("lmstudio:org/Gemma-GGUF/gemma-Q4_0.gguf") == new / name
    assert locate("lmstudio:Org/gemma-gguf:Q4_0") == new / name
    assert locate_drafter("lmstudio:org/Gemma-GGUF", new / name, "auto") == (new / name).with_name("mtp-gemma.gguf")
    (home / ".lmstudio-home-pointer").write_text(f"{moved}\n")
    files(name)(moved)
    assert locate("lmstudio:org/Gemma-GGUF") == moved / name
    (moved / "settings.json").write_text(json.dumps({"downloadsFolder": str(tmp_path / "elsewhere")}))
    assert locate("lmstudio:org/Gemma-GGUF") == moved / name  # there is no such folder
    files("org/Gemma-GGUF/gemma-Q4_0.gguf")(tmp_path / "elsewhere")
    assert locate("lmstudio:org/Gemma-GGUF") == tmp_path / "elsewhere/org/Gemma-GGUF/gemma-Q4_0.gguf"
    (moved / "settings.json").write_text("{")
    assert locate("lmstudio:org/Gemma-GGUF") == moved / name


@pytest.mark.parametrize(
    "name", ["", "org", "org/absent", "org/Gemma-GGUF/../../..", "/etc/passwd", "a\0b/c", "x" * 5000 + "/y"]
)
def test_lm_studio_names_that_are_none(home: Path, name: str) -> None:
    files("models/org/Gemma-GGUF/gemma-Q4_0.gguf")(home / ".lmstudio")
    assert "no such model in" in refused("lmstudio:" + name)


def test_hub_ids_in_other_folders(home: Path) -> None:
    notices: list[str] = []
    flat = home / ".cache" / "llama.cpp"
    files("org_gemma-GGUF_gemma-Q4_0.gguf", "org_gemma-GGUF_mtp-gemma.gguf", "org_other_x-Q4_0.gguf")(flat)
    files("half.gguf.downloadInProgress")(flat)
    in_flat = flat / "org_gemma-GGUF_gemma-Q4_0.gguf"
    assert locate("org/gemma-GGUF", notices.append) == in_flat
    assert notices == [f"model: {in_flat}, found in the folders of llama.cpp"]
    assert locate("org/gemma-GGUF:Q4_0") == in_flat
    assert locate("org/gemma-GGUF/gemma-Q4_0.gguf") == in_flat
    assert locate("llama.cpp:org_gemma-GGUF_gemma-Q4_0.gguf") == in_flat
    assert locate("org_gemma-GGUF_gemma-Q4_0.gguf") == in_flat
    assert locate_drafter("org/gemma-GGUF", in_flat, "auto") == flat / "org_gemma-GGUF_mtp-gemma.gguf"
    assert "no such repository" in refused("org/gemma-GGUF:Q8_0")
    assert "no such file in" in refused("llama.cpp:absent.gguf")
    files("x.gguf")(flat.parent)
    assert "no such file in" in refused("llama.cpp:../x.gguf")
    assert "has not finished" in refused("llama.cpp:half.gguf")
    files("models/org/gemma-GGUF/gemma-Q8_0.gguf")(home / ".lmstudio")
    in_studio = home / ".lmstudio/models/org/gemma-GGUF/gemma-Q8_0.gguf"
    assert locate("org/gemma-GGUF") == in_studio
    assert locate("org/gemma-GGUF:Q4_0") == in_flat
    assert locate("gemma-Q8_0.gguf") == in_studio
    assert "no such folder or file" in refused("gemma-Q5_0.gguf")
    snapshot = cache(home / ".cache" / "huggingface", "org/gemma-GGUF", files("gemma-Q5_0.gguf"))
    assert locate("org/gemma-GGUF") == snapshot / "gemma-Q5_0.gguf"


@pytest.mark.parametrize(
    ("model", "meant"),
    [
        ("gemma4:e2b", "ollama:gemma4:e2b"),
        ("gemma4:e3b", "ollama:gemma4:e2b"),
        ("ORG/gemma-4-E2B-it-GUFF", "org/gemma-4-e2b-it-gguf"),
        ("studio/gemma-4-E4B-it-GGUF", "lmstudio:studio/gemma-4-E4B-it-GGUF"),
        ("./gemma-4-E2b-it", "gemma-4-E2B-it"),
        ("quite-another-name", None),
    ],
)
def test_the_nearest_name_is_suggested(home: Path, tmp_path: Path, model: str, meant: str | None) -> None:
    pulled(home / ".ollama" / "models", "registry.ollama.ai/library/gemma4/e2b", layer("model"))
    cache(home / ".cache" / "huggingface", "org/gemma-4-e2b-it-gguf", files("mmproj-F16.gguf"))
    (home / ".lmstudio/models/studio/gemma-4-E4B-it-GGUF").mkdir(parents=True)
    (tmp_path / "gemma-4-E2B-it").mkdir()
    message = refused(model)
    assert (f"did you mean {meant}?" in message) if meant else ("did you mean" not in message)


def test_a_machine_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert "ollama pull m" in refused("ollama:m")
    assert "no such model" in refused("lmstudio:org/m")
    assert "no such repository" in refused("org/m")


def test_the_file_of_a_kind(home: Path) -> None:
    pulled(home / ".ollama" / "models", "registry.ollama.ai/library/m/latest", layer("model"))
    assert ollama_file("m", "draft") is None
