"""The command line on tiny random checkpoints: what it prints where, and one line for every wrong input."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import paceline
from paceline.cli.main import run
from paceline.types import Event
from tests.fixtures.checkpoints import (
    DRAFTER,
    PREFIX,
    TARGET,
    changed,
    drafter_weights,
    target_weights,
    write,
    write_drafter,
    write_target,
)
from tests.fixtures.text_samples import gemma_like

PROMPT = "A paceline is"
TEMPLATE = "{{ bos_token }}{% for m in messages %}<|turn>{{ m.content }}<turn|>{% endfor %}"

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target with its drafter beside it."""
    folder = write_target(tmp_path_factory.mktemp("pair") / "tiny")
    write_drafter(folder.with_name("tiny-assistant"))
    gemma_like().save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text('{"eos_token_id": []}')  # never stops by itself
    return folder


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    """A target of one's own to damage, without a drafter."""
    return shutil.copytree(model, tmp_path / "copy")


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run a command line in this process: exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def process(*arguments: object, stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a command line in a process of its own."""
    command = [sys.executable, "-m", "paceline", *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, env=os.environ | environment, timeout=120)


# -- generate ----------------------------------------------------------------------------------------------------------


def generate_json(cli: Cli, model: Path, *options: object) -> dict[str, Any]:
    code, out, _ = cli("generate", PROMPT, "-m", model, "--raw", "--max-tokens", 24, "--json", *options)
    assert code == 0
    assert len(out.splitlines()) == 1
    return json.loads(out)


def test_json(cli: Cli, model: Path) -> None:
    found = generate_json(cli, model, "--draft-tokens", 3, "--quant", "q8")
    engine = paceline.load(str(model), quant="q8")
    assert found["text"] == engine.tokenizer.decode(found["tokens"])
    assert found["prompt_tokens"] == len(engine.tokenizer.encode(PROMPT, bos=True))
    assert len(found["tokens"]) == 24
    assert (found["finish"], found["quant"], found["draft_tokens"]) == ("length", "q8", 3)
    assert found["model"] == str(model)
    assert found["seconds"] > 0
    assert found["tokens_per_second"] == pytest.approx(23 / found["seconds"])
    assert found["acceptance_length"] == pytest.approx(23 / found["rounds"])
    assert found["rounds"] + found["accepted"] == 23
    assert found["drafted"] >= found["accepted"]
    assert len(found["acceptance_by_depth"]) == 3
    assert sum(found["acceptance_by_depth"]) == pytest.approx(found["accepted"] / found["rounds"])


def test_text_does_not_depend_on_the_drafter(cli: Cli, model: Path) -> None:
    plain = generate_json(cli, model, "--draft-tokens", 0)
    assert plain["drafted"] == 0
    assert plain["acceptance_length"] == 1
    assert plain["acceptance_by_depth"] == []
    for options in (("--draft-tokens", 4), ("--drafter", "none"), ("--threads", 1)):
        assert generate_json(cli, model, *options)["tokens"] == plain["tokens"]
    assert generate_json(cli, model, "--drafter", "none")["draft_tokens"] == 0


def test_text_goes_to_stdout_and_figures_to_stderr(cli: Cli, model: Path) -> None:
    code, out, err = cli("generate", PROMPT, "-m", model, "--raw", "--max-tokens", 24, "--quant", "bf16")
    assert code == 0
    assert out == generate_json(cli, model, "--quant", "bf16")["text"] + "\n"
    assert err.startswith("24 tokens, ")
    assert "acceptance length" in err
    assert len(err.splitlines()) == 1


def test_text_appears_as_it_is_made(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(terminal, encoding="utf-8"))
    seen: list[int] = []
    go_on = paceline.Stream.__next__

    def watched(stream: paceline.Stream) -> Event:
        seen.append(len(terminal.getvalue()))
        return go_on(stream)

    monkeypatch.setattr(paceline.Stream, "__next__", watched)
    assert run(["generate", PROMPT, "-m", str(model), "--raw", "--max-tokens", "24", "--draft-tokens", "0"]) == 0
    assert len(set(seen)) > 4


def test_notices_are_given(cli: Cli, copy: Path) -> None:
    _, _, err = cli("generate", PROMPT, "-m", copy, "--raw", "--max-tokens", 2)
    assert "paceline: drafter: none found" in err
    assert "paceline: weights: f32" in err


def test_chat_template(cli: Cli, copy: Path) -> None:
    (copy / "chat_template.jinja").write_text(TEMPLATE)
    (copy / "tokenizer_config.json").write_text('{"bos_token": "<bos>"}')
    chat = cli("generate", PROMPT, "-m", copy, "--max-tokens", 8)
    raw = cli("generate", f"<bos><|turn>{PROMPT}<turn|>", "-m", copy, "--max-tokens", 8, "--raw")
    assert chat[:2] == raw[:2]
    assert chat[1] != cli("generate", PROMPT, "-m", copy, "--max-tokens", 8, "--raw")[1]


def test_stdin(model: Path, cli: Cli) -> None:
    options = ("-m", model, "--raw", "--max-tokens", 8, "--drafter", "none")
    done = process("generate", "-", *options, stdin=PROMPT.encode())
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode() == cli("generate", PROMPT, *options)[1]


def test_stdin_that_is_not_text() -> None:
    done = process("generate", "-", "-m", "/absent", stdin=b"caf\xe9")
    assert done.returncode == 2
    assert done.stderr.decode().splitlines() == [
        "paceline: error: stdin: is not UTF-8 text (byte 0xe9 at offset 3); "
        "convert it first, for example with iconv -t UTF-8"
    ]


def test_ctrl_c_keeps_what_was_written(model: Path) -> None:
    options = ["--raw", "--max-tokens", "4000", "--drafter", "none", "--quant", "f32"]
    command = [sys.executable, "-m", "paceline", "generate", PROMPT, "-m", str(model), *options]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert running.stdout is not None
    first = running.stdout.read(1)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert (first + out).endswith(b"\n")
    assert len(err.splitlines()) == 1
    assert 0 < int(err.split()[0]) < 4000


def test_ctrl_c_with_json(cli: Cli, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = paceline.Stream.__next__

    def interrupted(stream: paceline.Stream) -> Event:
        if stream.statistics.tokens == 5:
            raise KeyboardInterrupt
        return go_on(stream)

    monkeypatch.setattr(paceline.Stream, "__next__", interrupted)
    code, out, err = cli("generate", PROMPT, "-m", model, "--raw", "--json", "--draft-tokens", 0, "--quant", "f32")
    assert code == 130
    assert err.startswith("5 tokens, ")
    found = json.loads(out)
    assert (found["finish"], len(found["tokens"])) == ("cancelled", 5)


def test_a_stop_token_keeps_held_back_text(cli: Cli, copy: Path) -> None:
    """A run of byte tokens is text only when it ends, and a stop token may be what ends it."""
    tokens = generate_json(cli, copy, "--drafter", "none", "--max-tokens", 200)["tokens"]
    bytes_ = {token for text, token in gemma_like().get_vocab().items() if text.startswith("<0x")}
    place = next(i for i in range(1, 200) if tokens[i - 1] in bytes_ and tokens[i] not in tokens[:i])
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": tokens[place]}))
    write_drafter(copy.with_name("copy-assistant"))
    for depth in (0, 1, 4):
        found = generate_json(cli, copy, "--draft-tokens", depth, "--max-tokens", 200)
        assert found["tokens"] == tokens[:place]
        assert found["finish"] == "stop"
        assert found["text"] == gemma_like().decode(tokens[:place])


# -- wrong inputs ------------------------------------------------------------------------------------------------------


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def corrupt(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:8] + b"#" * 100 + path.read_bytes()[108:])


def without_a_tensor(folder: Path) -> None:
    weights = target_weights()
    del weights[PREFIX + "layers.1.self_attn.q_proj.weight"]
    write(folder, TARGET, weights)


def with_a_leftover(folder: Path) -> None:
    write(folder, TARGET, target_weights() | {PREFIX + "layers.1.surprise": np.zeros(3, np.float32)})


def misshapen(folder: Path) -> None:
    weights = target_weights()
    weights[PREFIX + "layers.1.self_attn.q_proj.weight"] = np.zeros((32, 32), np.float32)
    write(folder, TARGET, weights)


def of_another_kind(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama"}')


def with_broken_settings(folder: Path) -> None:
    (folder / "config.json").write_text("{")


DAMAGE: dict[Callable[[Path], object], tuple[str, ...]] = {
    shutil.rmtree: ("copy", "no such folder"),
    lambda folder: (folder / "config.json").unlink(): ("config.json", "missing"),
    with_broken_settings: ("config.json", "not valid JSON"),
    of_another_kind: ("config.json", "not a Gemma model", "llama"),
    lambda folder: (folder / "model.safetensors").unlink(): ("copy", "has a config.json but no weights"),
    truncate: ("model.safetensors", "truncated", "download it again"),
    corrupt: ("model.safetensors", "damaged", "download it again"),
    without_a_tensor: ("copy", "layers.1.self_attn.q_proj.weight", "missing"),
    with_a_leftover: ("model.safetensors", "layers.1.surprise", "unknown"),
    misshapen: ("model.safetensors", "layers.1.self_attn.q_proj.weight", "[32, 32]", "[64, 32]"),
}


def assert_refused(result: tuple[int, str, str], *parts: str) -> None:
    """Exit code 2 and one line of error, after notices at most."""
    code, _, err = result
    *notices, error = err.splitlines()
    assert code == 2
    assert error.startswith("paceline: error: ")
    assert not [line for line in notices if not line.startswith("paceline: ") or "error" in line]
    for part in parts:
        assert part in error


@pytest.mark.parametrize("verb", ["generate", "inspect"])
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damaged_models(cli: Cli, copy: Path, verb: str, damage: Callable[[Path], object]) -> None:
    damage(copy)
    line = ("generate", "x", "--raw", "-m", copy) if verb == "generate" else ("inspect", copy)
    assert_refused(cli(*line), *DAMAGE[damage])


def test_no_traceback_in_a_real_process(copy: Path) -> None:
    truncate(copy)
    done = process("generate", "x", "-m", copy)
    assert done.returncode == 2
    assert done.stdout == b""
    assert len(done.stderr.splitlines()) == 1


def test_damaged_tokenizer(cli: Cli, copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{")
    assert_refused(cli("generate", "x", "--raw", "-m", copy), "tokenizer.json", "download it again")
    (copy / "tokenizer.json").unlink()
    assert_refused(cli("generate", "x", "--raw", "-m", copy), "tokenizer.json", "missing")


def test_a_drafter_of_another_target(cli: Cli, model: Path, tmp_path: Path) -> None:
    config = DRAFTER | {"backbone_hidden_size": 48}
    other = write(tmp_path / "other", config, drafter_weights(config))
    result = cli("generate", "x", "--raw", "-m", model, "--drafter", other)
    assert_refused(result, "does not fit", "48", "32", "--drafter none")
    config = changed(DRAFTER, global_head_dim=64)
    other = write(tmp_path / "heads", config, drafter_weights(config))
    assert_refused(cli("generate", "x", "--raw", "-m", model, "--drafter", other), "head_dim", "64", "32")


def test_models_in_the_wrong_place(cli: Cli, model: Path) -> None:
    drafter = f"{model}-assistant"
    assert_refused(cli("generate", "x", "-m", drafter), "config.json", "this is a drafter; pass it as --drafter")
    assert_refused(cli("inspect", drafter), "this is a drafter")
    assert_refused(cli("generate", "x", "-m", model, "--drafter", model), "not a Gemma 4 drafter")
    assert_refused(cli("generate", "x", "-m", model, "--drafter", "./absent"), "./absent", "no such folder")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--quant", "q3"), ("q3", "q4")),
        (("--threads", "0"), ("threads",)),
        (("--threads", "many"), ("threads",)),
        (("--max-tokens", "0"), ("max-tokens",)),
        (("--draft-tokens", "-1"), ("draft_tokens", "-1")),
        (("--draft-tokens", "some"), ("draft-tokens", "some", "auto")),
        (("--draft-tokens", "99"), ("draft_tokens", "99")),
        (("--frobnicate",), ("--frobnicate",)),
        (("a second prompt",), ("a second prompt",)),
        ((), ("no chat template", "--raw")),
    ],
)
def test_wrong_settings(cli: Cli, model: Path, options: tuple[str, ...], parts: tuple[str, ...]) -> None:
    assert_refused(cli("generate", PROMPT, "-m", model, *options), *parts)


def test_wrong_prompts(cli: Cli, model: Path) -> None:
    result = cli("generate", "xyz" * 4000, "--raw", "-m", model)
    assert_refused(result, "4096", "context", "shorten")
    assert_refused(cli("generate", "a\udce9", "--raw", "-m", model), "not valid text")
    assert_refused(cli("generate"), "PROMPT")


def test_unknown_verb(cli: Cli) -> None:
    assert_refused(cli("pedal"), "pedal")


def test_hub_ids_without_a_network(tmp_path: Path) -> None:
    done = process("inspect", "org/absent", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert b"org/absent" in done.stderr
    assert b"cannot be reached" in done.stderr


# -- inspect -----------------------------------------------------------------------------------------------------------


def inspect_json(cli: Cli, model: Path, *options: object) -> dict[str, Any]:
    code, out, err = cli("inspect", model, "--json", *options)
    assert (code, err) == (0, "")
    return json.loads(out)


def test_inspect(cli: Cli, model: Path) -> None:
    found = inspect_json(cli, model)
    assert found["shape"]["sliding"] == {"layers": 2, "head_dim": 16, "kv_heads": 1}
    assert found["shape"]["full"] == {"layers": 3, "head_dim": 32, "kv_heads": 1}
    assert found["shape"]["kv_shared_layers"] == 1
    assert found["files"] == {"model.safetensors": (model / "model.safetensors").stat().st_size}
    assert found["skipped"]["vision"] == {"tensors": 1, "bytes": 48, "first": "model.vision_tower.patch.weight"}
    assert found["cache"]["bytes_per_token"] == 2 * 2 * (2 * 16 + 2 * 32)
    assert found["cache"]["bytes_per_token_beyond_window"] == 2 * 2 * 2 * 32
    assert found["chat_template"] is False
    drafter = found["drafter"]
    assert (drafter["fits"], drafter["folder"]) == (True, f"{model}-assistant")


@pytest.mark.parametrize("quant", ["f32", "bf16", "q8", "q4"])
def test_inspect_foretells_the_memory(cli: Cli, quant: str) -> None:
    told = inspect_json(cli, Path("tiny-python"))["memory"][quant]
    # Vectors are told but not counted by the engine, and packing pads odd rows: little in a model of this size.
    assert paceline.load("tiny-python", quant=quant).backend.info.weight_bytes == pytest.approx(told, rel=0.02)


def test_inspect_reads_headers_only(cli: Cli, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> None:
        raise AssertionError("weights were read")

    for how in ("read", "map"):
        monkeypatch.setattr(f"paceline.checkpoint.TensorRef.{how}", read)
    assert inspect_json(cli, model)["drafter"]["fits"]


def test_inspect_for_people(cli: Cli, model: Path) -> None:
    code, out, _ = cli("inspect", model)
    assert code == 0
    for part in (str(model), "2 sliding + 3 full; the last 1 share K/V", "memory in q4", "vision: 1 tensors", "fits"):
        assert part in out
    [cache] = [line for line in out.splitlines() if line.startswith("KV cache")]
    assert cache.endswith("with --kv q8"), "wrapped"
    assert "none found" not in out
    assert "none found" in cli("inspect", model, "--drafter", "none")[1]


def test_inspect_a_pair_that_does_not_fit(cli: Cli, model: Path, tmp_path: Path) -> None:
    config = DRAFTER | {"backbone_hidden_size": 48}
    other = write(tmp_path / "other[bold]", config, drafter_weights(config))
    found = inspect_json(cli, model, "--drafter", other)["drafter"]
    assert not found["fits"]
    assert "48" in found["misfit"]
    out = cli("inspect", model, "--drafter", other)[1]
    assert "NO: the drafter does not fit" in out
    assert "other[bold]" in out


# -- the rest ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["generate", "--help"], ["demo", "--help"], ["inspect", "--help"]]
)
def test_help_teaches(cli: Cli, arguments: list[str]) -> None:
    code, out, err = cli(*arguments)
    assert (code, err) == (0, "")
    assert ("Start with:" if arguments in ([], ["--help"]) else "Examples:") in out


def test_version(cli: Cli) -> None:
    assert cli("--version") == (0, f"paceline {paceline.__version__}\n", "")


def modules_after(*arguments: object) -> set[str]:
    code = f"import sys; from paceline.cli.main import run; run({[str(a) for a in arguments]}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stdout.splitlines()[-1].split()}


def test_help_imports_nothing_heavy() -> None:
    heavy = {"numpy", "torch", "transformers", "tokenizers", "huggingface_hub", "jinja2", "safetensors"}
    assert not heavy & modules_after("generate", "--help")


def test_generating_on_a_cpu_needs_no_torch(model: Path) -> None:
    loaded = modules_after("generate", PROMPT, "-m", model, "--raw", "--max-tokens", 4)
    assert "tokenizers" in loaded
    assert not {"torch", "transformers"} & loaded
