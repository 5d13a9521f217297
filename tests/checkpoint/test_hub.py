"""Where a model is found. No test leaves this machine: the cache is written by hand, the hub is a stand-in."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import huggingface_hub
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

import paceline.errors
from paceline.checkpoint import locate, locate_drafter, unless_asked
from paceline.checkpoint.hub import HubName, parse
from paceline.errors import CheckpointError, PairError
from tests.fixtures.checkpoints import TARGET, target_weights, write, write_drafter, write_target
from tests.fixtures.model_stores import Hub, cache, files, hide_local_models, http, served

ID = "org/gemma-tiny"


@pytest.fixture(autouse=True)
def nothing_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hide_local_models(tmp_path, monkeypatch)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(tmp_path, monkeypatch)


def refused(model: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        locate(model)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_local_folders(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert locate("a/b").samefile(tmp_path / "a" / "b")  # though it could be a hub id
    assert locate(str(tmp_path / "a")) == tmp_path / "a"


@pytest.mark.parametrize("model", ["nowhere", "./no/where", "/no/where", "a/b/c", "x" * 5000, "a\0b", "~nobody/x"])
def test_names_that_are_neither(model: str, hub: Hub) -> None:
    assert model[:80] in refused(model)
    assert hub.asked == []


def test_the_bundled_pair(tmp_path: Path) -> None:
    (tmp_path / "tiny-python").mkdir()
    assets = Path(paceline.errors.__file__).parent / "assets"
    assert locate("tiny-python") == assets / "tiny-python"
    assert locate("tiny-python-assistant") == assets / "tiny-python-assistant"
    assert locate("./tiny-python").samefile(tmp_path / "tiny-python")


def test_local_files(tmp_path: Path) -> None:
    files("m/model.gguf", "m/sha256-0", "m/x.downloadInProgress", "m/y-partial", "m/y-partial-3")(tmp_path)
    assert locate("m/model.gguf").samefile(tmp_path / "m" / "model.gguf")
    assert locate("m/sha256-0").samefile(tmp_path / "m" / "sha256-0")  # as Ollama's blobs: a GGUF by its first bytes
    for name in ("m/x.downloadInProgress", "m/y-partial", "m/y-partial-3", "m/x"):
        assert "has not finished" in refused(name)
    (tmp_path / "m" / "notes.txt").write_text("text")
    assert "is no model file that is known" in refused("m/notes.txt")
    (tmp_path / "m" / "model.safetensors").write_text("text")
    assert "give the folder that holds it" in refused("m/model.safetensors")
    os.mkfifo(tmp_path / "pipe")
    assert "is neither a folder nor a file" in refused("./pipe")
    os.symlink("nothing", tmp_path / "broken")
    assert "is neither a folder nor a file" in refused("./broken")


def test_folders_with_ggufs(tmp_path: Path) -> None:
    files("one/gemma-Q4_0.gguf", "one/mmproj-F16.gguf", "one/mtp-gemma.gguf", "one/config.json")(tmp_path)
    assert locate("one").name == "gemma-Q4_0.gguf"
    files("several/gemma-Q4_0.gguf", size=4)(tmp_path)
    files("several/gemma-Q8_0.gguf", size=8)(tmp_path)
    notices: list[str] = []
    assert locate("several", notices.append).name == "gemma-Q8_0.gguf"
    assert len(notices) == 1
    assert "gemma-Q8_0.gguf" in notices[0]
    assert locate("several:q4_0", notices.append).name == "gemma-Q4_0.gguf"
    assert len(notices) == 1  # there was no choice
    assert "has no Q5_K file; there is Q4_0, Q8_0" in refused("several:Q5_K")
    files("split/gemma-Q4_0-00001-of-00002.gguf", "split/gemma-Q4_0-00002-of-00002.gguf")(tmp_path)
    assert locate("split").name == "gemma-Q4_0-00001-of-00002.gguf"
    files("two/gemma-E2B.gguf", "two/gemma-E4B.gguf")(tmp_path)
    assert "holds several models; give one of gemma-E2B.gguf, gemma-E4B.gguf" in refused("two")
    files("drafters/mtp-gemma.gguf")(tmp_path)
    assert "holds drafters only" in refused("drafters")
    files("towers/mmproj-F16.gguf")(tmp_path)
    assert "parts for images" in refused("towers")
    files("half/gemma-Q4_0.gguf.downloadInProgress")(tmp_path)
    assert "has not finished" in refused("half")
    files("tagged/config.json")(tmp_path)
    assert "has no GGUF" in refused("tagged:Q4_0")


def test_safetensors_are_preferred_to_ggufs(tmp_path: Path) -> None:
    files("m/model.safetensors", "m/gemma-Q4_0.gguf")(tmp_path)
    assert locate("m").name == "m"
    assert locate("m:Q4_0").name == "gemma-Q4_0.gguf"


@pytest.mark.parametrize(
    ("model", "meant"),
    [
        ("org/name", HubName("org/name")),
        ("org/name:Q4_K_M", HubName("org/name", tag="Q4_K_M")),
        ("org/name/file.gguf", HubName("org/name", file="file.gguf")),
        ("org/name/BF16/file-00001-of-00002.gguf", HubName("org/name", file="BF16/file-00001-of-00002.gguf")),
        ("hf.co/org/name:latest", HubName("org/name")),
        ("huggingface.co/org/name", HubName("org/name")),
        ("https://huggingface.co/org/name/", HubName("org/name")),
        ("https://huggingface.co/org/name/tree/main", HubName("org/name")),
        ("https://huggingface.co/org/name/blob/main/a/f.gguf", HubName("org/name", file="a/f.gguf")),
        ("https://huggingface.co/org/name/resolve/main/f.gguf?download=true", HubName("org/name", file="f.gguf")),
        ("name", None),
        ("org/name/other", None),
        ("org/../file.gguf", None),
        ("org/name/../file.gguf", None),
        ("org/name/.hidden/file.gguf", None),
        ("https://example.org/org/name", None),
    ],
)
def test_names_of_the_hub(model: str, meant: HubName | None) -> None:
    assert parse(model) == meant


@pytest.mark.parametrize("end", ["org/name/blob/dev/f.gguf", "org/name/blob/main/config.json", "org", "a/b/../f.gguf"])
def test_other_addresses_of_the_hub(end: str) -> None:
    assert "is no model or GGUF of a main branch" in refused("https://huggingface.co/" + end)


def test_download_of_safetensors(hub: Hub) -> None:
    hub.offer(ID, files("model.safetensors", "tokenizer.json", "README.md", "gemma-Q4_0.gguf", "pytorch_model.bin"))
    (hub.folder(ID) / "config.json").write_text("{}")
    assert locate(ID) == hub.downloads / ID
    assert hub.downloaded(ID) == {"config.json", "model.safetensors", "tokenizer.json"}


def test_what_cannot_be_read_is_not_downloaded(hub: Hub) -> None:
    hub.offer(ID, files("model.safetensors"))
    (hub.folder(ID) / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
    assert "is quantised with GPTQ" in refused(ID)
    assert hub.downloaded(ID) == {"config.json"}
    hub.offer("org/pickles", files("pytorch_model.bin", "config.json"))
    assert "a PyTorch pickle (pytorch_model.bin)" in refused("org/pickles")
    assert "has no GGUF, so none of format Q4_0" in refused(f"{ID}:Q4_0")
    hub.offer("org/nothing", files("README.md"))
    assert "has no weights that can be read" in refused("org/nothing")


def test_download_of_one_gguf_of_several(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["gemma-Q4_0.gguf", "gemma-Q8_0.gguf", "BF16/gemma-BF16-00001-of-00002.gguf"]
    names += ["BF16/gemma-BF16-00002-of-00002.gguf", "mmproj-F16.gguf", "MTP/gemma-Q8_0-MTP.gguf", "README.md"]
    hub.offer(ID, files(*names))
    hub.sizes = dict(zip(names, [4 << 30, 8 << 30, 8 << 30, 8 << 30], strict=False))
    monkeypatch.setattr("paceline.checkpoint.choice.available_memory", lambda: 12 << 30)
    notices: list[str] = []
    assert locate(ID, notices.append) == hub.downloads / ID / "gemma-Q8_0.gguf"
    assert hub.downloaded(ID) == {"gemma-Q8_0.gguf"}
    assert "gemma-Q8_0.gguf (8.59 GB), the best that fits the memory at hand (12.9 GB) of 3 files" in notices[0]
    assert locate(f"{ID}:q4_0") == hub.downloads / ID / "gemma-Q4_0.gguf"
    assert locate(f"{ID}:BF16") == hub.downloads / ID / names[2]
    assert hub.downloaded(ID) == set(names[:4])
    assert locate(f"https://hf.co/{ID}/resolve/main/mmproj-F16.gguf").name == "mmproj-F16.gguf"  # its reader says more
    assert "has no Q5_0 file; there is BF16, Q4_0, Q8_0" in refused(f"{ID}:Q5_0")
    assert "has no gemma-Q5_0.gguf; it has gemma-Q" in refused(f"{ID}/gemma-Q5_0.gguf")


def test_patterns_in_file_names_are_no_patterns(hub: Hub) -> None:
    hub.offer(ID, files("gemma-[a]-Q4_0.gguf", "gemma-a-Q8_0.gguf"))
    assert locate(f"{ID}:Q4_0").name == "gemma-[a]-Q4_0.gguf"


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (http(RepositoryNotFoundError, 404), "no such repository"),
        (http(GatedRepoError, 403), "is gated"),
        (LocalEntryNotFoundError("many\nlines"), "cannot be reached"),
        (OfflineModeIsEnabled("offline"), "cannot be reached"),
        (httpx.ProxyError("refused"), "cannot be reached"),
        (httpx.ConnectError("refused"), "cannot be reached"),
        (OSError(28, "No space left on device"), "No space left"),
        (RuntimeError(""), "RuntimeError"),
    ],
)
@pytest.mark.parametrize("suffix", ["", ":Q4_0", "/file.gguf"])
def test_download_errors(hub: Hub, answer: Exception, says: str, suffix: str) -> None:
    hub.content[ID] = answer
    message = refused(ID + suffix)
    assert says in message
    assert ID in message


def test_ggufs_in_the_cache_need_no_network(hub: Hub, tmp_path: Path) -> None:
    snapshot = cache(tmp_path / "home" / ".cache" / "huggingface", ID, files("gemma-Q4_0.gguf", "q/gemma-Q8_0.gguf"))
    (snapshot / "gemma-Q6_K.gguf").symlink_to("nothing")  # a download that was interrupted
    files("gemma-F16-00001-of-00002.gguf", size=99)(snapshot)  # another
    assert locate(f"{ID}:Q8_0") == snapshot / "q" / "gemma-Q8_0.gguf"
    assert locate(f"{ID}/q/gemma-Q8_0.gguf") == snapshot / "q" / "gemma-Q8_0.gguf"
    assert locate(ID) in (snapshot / "gemma-Q4_0.gguf", snapshot / "q" / "gemma-Q8_0.gguf")
    assert hub.asked == []
    refused(f"{ID}:F16")
    refused(f"{ID}/gemma-Q6_K.gguf")
    assert hub.asked == [ID, ID]


def test_the_cache_of_llama_cpp(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_CACHE", str(tmp_path / "llama" / "hub"))
    snapshot = cache(tmp_path / "llama", ID, files("gemma-Q4_0.gguf"))
    assert locate(ID) == snapshot / "gemma-Q4_0.gguf"
    assert hub.asked == []


@pytest.mark.parametrize("commit", ["../../../outside", "", "a" * 39, "\udcff"])
def test_a_damaged_ref_of_the_cache(hub: Hub, tmp_path: Path, commit: str) -> None:
    snapshot = cache(tmp_path / "home" / ".cache" / "huggingface", ID, files("gemma-Q4_0.gguf"))
    files("outside/gemma-Q4_0.gguf")(snapshot.parents[3])
    (snapshot.parents[1] / "refs" / "main").write_bytes(commit.encode(errors="surrogateescape"))
    refused(ID)
    assert hub.asked == [ID]


def test_drafter_choices(tmp_path: Path) -> None:
    model, drafter = tmp_path / "m", tmp_path / "m-assistant"
    model.mkdir()
    assert locate_drafter(str(model), model, "auto") is None
    drafter.mkdir()
    assert locate_drafter(str(model), model, "auto") == drafter
    assert locate_drafter(str(model) + "/", model, "auto") == drafter
    os.chdir(model)
    assert locate_drafter(".", Path("."), "auto") == drafter
    assert locate_drafter(str(model), model, "none") is None
    assert locate_drafter(str(model), model, str(drafter)) == drafter
    with pytest.raises(CheckpointError, match="no such folder"):
        locate_drafter(str(model), model, "./absent")


def test_drafters_beside_a_gguf(tmp_path: Path) -> None:
    def found(target: str) -> str | None:
        place = locate_drafter(str(tmp_path / target), tmp_path / target, "auto")
        return place and str(place.relative_to(tmp_path))

    files("m/q/gemma-E2B-it-Q4_0.gguf", "m/gemma-E2B-it-Q8_0.gguf")(tmp_path)
    assert found("m/gemma-E2B-it-Q8_0.gguf") is None
    for name in ("m/gemma-E2B-it-assistant", "m/gemma-E2B-it-Q8_0-assistant"):
        (tmp_path / name).mkdir()
        assert found("m/gemma-E2B-it-Q8_0.gguf") == name
    files("m/MTP/gemma-E2B-it-F16-MTP.gguf", "m/mtp-gemma-E4B-it.gguf")(tmp_path)
    assert found("m/gemma-E2B-it-Q8_0.gguf") == "m/MTP/gemma-E2B-it-F16-MTP.gguf"
    assert found("m/q/gemma-E2B-it-Q4_0.gguf") == "m/MTP/gemma-E2B-it-F16-MTP.gguf"
    files("m/mtp-gemma-E2B-it.gguf")(tmp_path)
    assert found("m/gemma-E2B-it-Q8_0.gguf") == "m/mtp-gemma-E2B-it.gguf"
    assert found("m/q/gemma-E2B-it-Q4_0.gguf") == "m/mtp-gemma-E2B-it.gguf"
    os.chdir(tmp_path / "m")
    target = "gemma-E2B-it-Q8_0.gguf"
    assert locate_drafter(target, Path(target), "auto") == Path.cwd() / "mtp-gemma-E2B-it.gguf"


def test_a_drafter_that_is_asked_for(tmp_path: Path, hub: Hub) -> None:
    files("m/gemma-Q4_0.gguf", "d/gemma-assistant.Q8_0.gguf", "d/gemma-assistant.Q4_0.gguf")(tmp_path)
    target = tmp_path / "m" / "gemma-Q4_0.gguf"
    assert locate_drafter(str(target), target, "d") == Path("d/gemma-assistant.Q4_0.gguf")  # in the target's format
    assert locate_drafter(str(target), target, "d:Q8_0") == Path("d/gemma-assistant.Q8_0.gguf")
    assert locate_drafter(str(target), target, "d/gemma-assistant.Q8_0.gguf") == Path("d/gemma-assistant.Q8_0.gguf")
    with pytest.raises(CheckpointError, match="has no drafter of gemma-Q4_0"):
        locate_drafter(str(target), target, "m")
    hub.offer("org/heads-MTP-GGUF", files("gemma-head-Q8_0.gguf"))
    found = locate_drafter(str(target), target, "org/heads-MTP-GGUF")
    assert found == hub.downloads / "org/heads-MTP-GGUF" / "gemma-head-Q8_0.gguf"


def test_drafter_of_a_hub_id(hub: Hub, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    assert locate_drafter(ID, place, "auto") is None  # the hub has none
    hub.content[ID + "-assistant"] = LocalEntryNotFoundError("no network")
    assert locate_drafter(ID, place, "auto") is None
    hub.offer(ID + "-assistant", files("model.safetensors"))
    assert locate_drafter(ID, place, "auto") == hub.downloads / (ID + "-assistant")
    hub.content[ID + "-assistant"] = OSError(28, "No space left on device")
    with pytest.raises(CheckpointError, match="No space"):  # not the same as having none
        locate_drafter(ID, place, "auto")
    with pytest.raises(CheckpointError, match="no such repository"):
        locate_drafter(ID, place, "org/absent")


def test_drafter_of_a_gguf_on_the_hub(hub: Hub) -> None:
    model = "org/gemma-E2B-it-GGUF"
    hub.offer(model, files("gemma-E2B-it-Q4_0.gguf"))
    place = locate(model)
    assert locate_drafter(model, place, "auto") is None
    assert hub.asked == [model, model, "org/gemma-E2B-it-assistant-GGUF", "org/gemma-E2B-it-assistant"]
    hub.offer("org/gemma-E2B-it-assistant", files("model.safetensors"))
    assert locate_drafter(model, place, "auto") == hub.downloads / "org/gemma-E2B-it-assistant"
    hub.offer("org/gemma-E2B-it-assistant-GGUF", files("gemma-E2B-it-assistant.Q4_0.gguf"))
    assert str(locate_drafter(model, place, "auto")).endswith("-assistant-GGUF/gemma-E2B-it-assistant.Q4_0.gguf")
    files("MTP/mtp-gemma-E2B-it-Q8_0.gguf", "MTP/mtp-gemma-E2B-it-Q4_0.gguf")(hub.folder(model))
    drafter = hub.downloads / model / "MTP" / "mtp-gemma-E2B-it-Q4_0.gguf"
    assert locate_drafter(model, place, "auto") == drafter
    asked = len(hub.asked)
    assert locate_drafter(model, place, "auto") == drafter  # now it lies beside its target
    assert len(hub.asked) == asked


def test_drafter_of_a_gguf_trained_for_its_format(hub: Hub) -> None:
    model = "org/gemma-E2B-it-qat-q4_0-gguf"
    hub.offer(model, files("gemma-E2B_q4_0-it.gguf"))
    hub.offer("org/gemma-E2B-it-qat-q4_0-unquantized-assistant", files("model.safetensors"))
    notices: list[str] = []
    found = locate_drafter(model, locate(model), "auto", notices.append)
    assert found == hub.downloads / "org/gemma-E2B-it-qat-q4_0-unquantized-assistant"
    assert notices == []
    hub.offer("org/gemma-E2B-it-assistant", files("model.safetensors"))
    locate_drafter(model, locate(model), "org/gemma-E2B-it-assistant", notices.append)
    assert len(notices) == 1
    assert "only one of the pair is named as QAT" in notices[0]


def test_a_local_folder_with_a_tag_is_no_hub_id(tmp_path: Path, hub: Hub) -> None:
    files("org/name/gemma-Q4_0.gguf")(tmp_path)
    place = locate("org/name:Q4_0")
    assert place.samefile(tmp_path / "org/name/gemma-Q4_0.gguf")
    assert locate_drafter("org/name:Q4_0", place, "auto") is None
    assert hub.asked == []


def test_the_network_is_asked_once_when_it_is_down(hub: Hub, tmp_path: Path) -> None:
    model, others = "org/gemma-E2B-it-GGUF", ("org/gemma-E2B-it-assistant-GGUF", "org/gemma-E2B-it-assistant")
    hub.content = {name: httpx.ConnectError("down") for name in (model, *others)}
    files("snapshot/gemma-E2B-it-Q4_0.gguf")(tmp_path)
    place = tmp_path / "snapshot" / "gemma-E2B-it-Q4_0.gguf"
    assert locate_drafter(model, place, "auto") is None
    assert hub.asked == [model]
    hub.offer(model, files("gemma-E2B-it-Q4_0.gguf"))
    assert locate_drafter(model, place, "auto") is None
    assert hub.asked == [model, model, others[0]]


@pytest.mark.parametrize("error", [CheckpointError("m: damaged"), PairError("sizes")])
def test_a_drafter_that_nobody_asked_for_is_left_out(error: Exception) -> None:
    notices: list[str] = []
    with unless_asked("auto", notices.append):
        raise error
    assert notices == [f"drafter: left out; {error}"]
    with pytest.raises(type(error)), unless_asked("./m", notices.append):
        raise error
    with pytest.raises(ValueError, match="a defect"), unless_asked("auto", notices.append):
        raise ValueError("a defect")
    assert len(notices) == 1


def real_client(home: Path, code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run code with the real client of the hub, and its cache in `home`."""
    environment = os.environ | {"HF_HOME": str(home), "NO_PROXY": "127.0.0.1", **variables}
    code = "from paceline.checkpoint import *; from paceline.errors import *\n" + code
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def offline(home: Path, code: str) -> subprocess.CompletedProcess[str]:
    return real_client(home, code, HF_HUB_OFFLINE="1")


def test_offline_when_cached(tmp_path: Path) -> None:
    target = cache(tmp_path, ID, write_target)
    drafter = cache(tmp_path, ID + "-assistant", write_drafter)
    code = f"folder = locate('{ID}'); print(folder); print(locate_drafter('{ID}', folder, 'auto'))"
    done = offline(tmp_path, code)
    assert done.stdout.split() == [str(target), str(drafter)], done.stderr


def test_offline_when_ggufs_are_cached(tmp_path: Path) -> None:
    snapshot = cache(tmp_path, ID + "-GGUF", files("gemma-tiny-Q4_0.gguf", "mtp-gemma-tiny.gguf"))
    code = f"place = locate('{ID}-GGUF'); print(place); print(locate_drafter('{ID}-GGUF', place, 'auto'))"
    done = offline(tmp_path, code)
    expected = [str(snapshot / "gemma-tiny-Q4_0.gguf"), str(snapshot / "mtp-gemma-tiny.gguf")]
    assert done.stdout.split() == expected, done.stderr


def test_the_real_client_fetches_only_what_is_chosen(tmp_path: Path) -> None:
    content = {
        "gemma-E2B-it-Q4_0.gguf": b"GGUF" + bytes(10),
        "gemma-E2B-it-Q8_0.gguf": b"GGUF" + bytes(20),
        "MTP/gemma-E2B-it-Q8_0-MTP.gguf": b"GGUF" + bytes(5),
        "mmproj-F16.gguf": b"GGUF",
    }
    code = f"place = locate('{ID}'); print(place); print(locate_drafter('{ID}', place, 'auto'))"
    with served(ID, content) as (address, asked):
        done = real_client(tmp_path, code, HF_ENDPOINT=address)
        places = [Path(line) for line in done.stdout.splitlines()]
        assert [path.name for path in places] == ["gemma-E2B-it-Q8_0.gguf", "gemma-E2B-it-Q8_0-MTP.gguf"], done.stderr
        assert [path.read_bytes() for path in places] == [content["gemma-E2B-it-Q8_0.gguf"], b"GGUF" + bytes(5)]
        assert {path.rpartition("/")[2] for path in asked if "/resolve/" in path} == {path.name for path in places}
        asked.clear()
        assert real_client(tmp_path, code, HF_ENDPOINT=address).stdout == done.stdout
        assert asked == []  # everything is here
        absent = real_client(tmp_path, code.replace(ID, "org/absent"), HF_ENDPOINT=address)
        assert "no such repository on the hub" in absent.stderr


def test_half_a_download_is_resumed(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "half", TARGET, target_weights(), shards=2)
    (tmp_path / "half" / "model-00002-of-00002.safetensors").unlink()
    hub.offer(ID, write_target)

    def snapshot_download(repository: str, *, local_files_only: bool = False, **options: list[str]) -> str:
        return str(tmp_path / "half") if local_files_only else hub.snapshot_download(repository, **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert locate(ID) == hub.downloads / ID
    shutil.rmtree(tmp_path / "half")
    write_target(tmp_path / "half")
    assert locate(ID) == tmp_path / "half"  # now there is nothing left to fetch


def test_offline_with_half_a_download(tmp_path: Path) -> None:
    def interrupted(folder: Path) -> None:
        write(folder, TARGET, target_weights(), shards=2)
        (folder / "model-00002-of-00002.safetensors").unlink()

    cache(tmp_path, ID, interrupted)
    code = f"try: locate('{ID}')\nexcept CheckpointError as error: print(error)"
    done = offline(tmp_path, code)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert "only partly in the hub's cache, and the hub cannot be reached" in done.stdout
