"""Mutated model files: a right load or one line, whatever they hold."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

import paceline
from paceline.checkpoint import Checkpoint
from paceline.errors import CheckpointError, PacelineError
from paceline.files import MAX_JSON_BYTES, read_json
from tests.fixtures import checkpoints
from tests.robustness import bases
from tests.robustness.__main__ import kinds_of
from tests.robustness.mutators import MUTATORS


def attack(cases: int) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "tests.robustness", "--cases", str(cases)], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_mutated_files_are_loaded_right_or_refused() -> None:
    attack(50)


@pytest.mark.slow
def test_thousands_of_mutated_files_are_loaded_right_or_refused() -> None:
    attack(2000)


def test_cases_are_mixed_by_their_shares() -> None:
    chosen = kinds_of(1000, list(MUTATORS))
    shares = {kind: share for kind, (share, _) in MUTATORS.items()}
    for kind, share in shares.items():
        seeds = [seed for one, seed in chosen if one == kind]
        assert seeds == list(range(len(seeds)))
        assert abs(len(seeds) / 1000 - share / sum(shares.values())) < 0.02


def test_a_case_depends_on_its_seed_alone(whole: Path, tmp_path: Path) -> None:
    def contents(kind: str, seed: int, to: Path) -> dict[str, bytes]:
        MUTATORS[kind][1](random.Random(seed), whole, to)
        return {str(path.relative_to(to)): path.read_bytes() for path in sorted(to.rglob("*")) if path.is_file()}

    for kind in (kind for kind in MUTATORS if kind != "packs"):  # these change what a load has kept
        seen = [contents(kind, seed, tmp_path / f"{kind}-{seed}") for seed in range(30)]
        for seed in reversed(range(0, 30, 7)):
            assert contents(kind, seed, tmp_path / f"{kind}-{seed}-again") == seen[seed]


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    bases.make(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("num_attention_heads", 1),
        ("num_attention_heads", 4),
        ("num_key_value_heads", 2),
        ("attention_k_eq_v", True),
        ("hidden_size_per_layer_input", 0),
        ("hidden_size_per_layer_input", 16),
        ("num_hidden_layers", 4),
        ("num_kv_shared_layers", 0),
        ("num_kv_shared_layers", 2),
        ("vocab_size", 400),
        ("head_dim", 32),
        ("intermediate_size", 128),
        ("use_double_wide_mlp", False),
    ],
)
def test_a_converted_folder_must_match_its_settings(whole: Path, setting: str, value: object) -> None:
    path = whole / "q8" / "config.json"
    config = json.loads(path.read_bytes())
    config["text_config"][setting] = value
    if setting == "num_hidden_layers":
        config["text_config"]["layer_types"] = config["text_config"]["layer_types"][:value]
    path.write_text(json.dumps(config))
    with pytest.raises(
        PacelineError, match=r"model.paceline: cannot be used .* convert the model again|config.json|tokenizer.json"
    ):
        paceline.load(str(whole / "q8"), drafter="none", context=64)


def test_what_is_no_plain_file_is_refused(whole: Path) -> None:
    """A pipe would block, and a device would fill the memory."""
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "model.safetensors"):
        folder = bases.copy(whole, "edge", whole / name.replace(".", "-"))
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(CheckpointError, match=r"missing|model.safetensors"):
            Checkpoint.open(folder)


def test_json_files_have_a_largest_size(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    with pytest.raises(CheckpointError, match="larger than"):
        read_json(path)


@pytest.mark.parametrize("shard", ["a" * 300, "x\0y", "../model.safetensors", "/etc/passwd", "..", ""])
def test_an_index_names_only_files_of_its_folder(tmp_path: Path, shard: str) -> None:
    folder = checkpoints.write(tmp_path / "x", checkpoints.TARGET, checkpoints.target_weights(), shards=2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][random.Random(0).choice(list(index["weight_map"]))] = shard
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError):
        Checkpoint.open(folder)


def test_a_context_beyond_the_memory_is_one_line(whole: Path) -> None:
    path = whole / "edge" / "config.json"
    config = json.loads(path.read_bytes())
    config["text_config"]["max_position_embeddings"] = 1 << 24
    config["text_config"]["sliding_window"] = 1 << 24
    path.write_text(json.dumps(config))
    program = (
        "import resource, sys, paceline; resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"
        "from paceline.errors import BackendError\n"
        "try: paceline.load(sys.argv[1], context=1 << 24, slots=64, drafter='none')\n"
        "except BackendError as error: print(error)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(whole / "edge")], capture_output=True, text=True)
    assert ended.stderr == ""
    assert "use a shorter context or fewer slots, or --kv q8" in ended.stdout
