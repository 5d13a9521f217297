"""What a pair's names and formats say against it."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from paceline.checkpoint import Checkpoint, TensorRef, pair_doubts, target_tensors
from paceline.checkpoint.config_json import target_config
from tests.fixtures import checkpoints
from tests.fixtures.gguf_files import write_gguf


def made(path: str, dtype: str = "BF16", name: str = "") -> Checkpoint:
    refs = {
        "w": TensorRef("w", dtype, (32, 32), Path(path), 0, 0),
        "order": TensorRef("o", "I64", (8, 4), Path(path), 0, 0),
    }
    return Checkpoint(Path(path), {"_name_or_path": name} if name else {}, {}, {}, refs)


def hub(repository: str) -> str:
    return f"/cache/hub/models--{repository.replace('/', '--')}/snapshots/0123456789abcdef"


GOOD = made(hub("google/gemma-4-E2B-it-assistant"))


@pytest.mark.parametrize(
    "path",
    [
        hub("google/gemma-4-E2B-it"),
        hub("google/gemma-4-26B-A4B-it"),
        hub("unsloth/gemma-4-E2B-it-GGUF"),
        hub("google/gemma-3-270m"),
        "/models/gemma-4-31B-it",
        "/models/gemma-4-E2B-it-UD-Q4_K_XL.gguf",
        "/models/gemma-4-12B-it-IQ4_XS.gguf",
        "/models/gemma-4-12B-it-IQ4_NL.gguf",
        "/models/gemma-4-26B-A4B-it-MXFP4_MOE.gguf",
        "/models/gemma-4-31B-it-Q8_0-00001-of-00002.gguf",
        hub("bartowski/google_gemma-4-E2B-it-GGUF"),
        hub("mradermacher/gemma-4-E2B-it-i1-GGUF"),
        "/ollama/blobs/sha256-5f3b0c1d" + "0a" * 28,
        "/models/gemma4-e2b",
        "/assets/tiny-python",
    ],
)
def test_usual_names_raise_no_doubt(path: str) -> None:
    assert pair_doubts(made(path), GOOD, "q8") == []


@pytest.mark.parametrize(
    ("path", "word"),
    [
        (hub("somebody/gemma-4-E2B-it-heretic"), "heretic"),
        ("/home/me/support-bot", "support"),
        ("/models/gemma-4-E2B-it-abliterated-Q4_K_M.gguf", "abliterated"),
    ],
)
def test_names_of_others_may_be_fine_tunes(path: str, word: str) -> None:
    (doubt,) = pair_doubts(made(path), GOOD, "q8")
    assert word in doubt
    assert "fine-tuned" in doubt


def test_a_strange_name_counts_wherever_it_stands() -> None:
    assert pair_doubts(made("/models/model", name="google/gemma-4-E2B-it"), GOOD, "q8") == []
    assert pair_doubts(made("/models/gemma-4-E2B-it", name="me/gemma-4-E2B-poet"), GOOD, "q8")
    assert pair_doubts(made("/home/me/support-bot", name="google/gemma-4-E2B-it"), GOOD, "q8")


@pytest.mark.parametrize("called", ["Gemma 4 E2B It", "Gemma-4-E2B-It", "Unsloth Gemma 4 E2B"])
def test_usual_names_in_ggufs_raise_no_doubt(called: str) -> None:
    assert pair_doubts(made("/models/gemma-4-E2B-it-Q4_0.gguf", name=f"{called} it"), GOOD, "q8") == []


def test_a_gguf_says_what_it_is_called(tmp_path: Path) -> None:
    shapes = target_tensors(target_config(checkpoints.TARGET))
    weights = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}

    def call_it(writer: gguf.GGUFWriter) -> None:
        writer.add_name("Gemma 4 E2B")
        writer.add_finetune("poet")

    file = write_gguf(tmp_path / "gemma-4-E2B-it.gguf", checkpoints.TARGET, weights, change=call_it)
    (doubt,) = pair_doubts(Checkpoint.open(file), GOOD, "file")
    assert "'Gemma 4 E2B poet' (poet:" in doubt


def test_only_one_of_the_pair_is_qat() -> None:
    qat = made(hub("google/gemma-4-E2B-it-qat-q4_0-unquantized"))
    assert pair_doubts(qat, GOOD, "q8") == ["only one of the pair is named as QAT"]
    both = made(hub("google/gemma-4-E2B-it-qat-q4_0-unquantized-assistant"))
    assert pair_doubts(qat, both, "q8") == []
    assert pair_doubts(qat, both, "q4") == []  # made for 4 bits
    assert pair_doubts(made("/m/gemma-4-E2B-it-qat-Q4_0.gguf", name="Gemma 4 E2B It"), both, "file") == []


def test_four_bits_are_a_doubt_unless_the_files_have_them(tmp_path: Path) -> None:
    (doubt,) = pair_doubts(made("/models/gemma-4-E2B-it"), GOOD, "q4")
    assert "rounded to 4 bits" in doubt
    file = tmp_path / "gemma-4-E2B-it.gguf"
    file.touch()
    assert pair_doubts(made(str(file)), GOOD, "q4") == []
    folder = tmp_path / "gemma-4-E2B-it"
    folder.mkdir()
    (folder / "model.paceline").touch()
    assert "convert it again" in pair_doubts(made(str(folder)), GOOD, "q4")[0]


def test_types_that_no_format_holds_are_left_out() -> None:
    assert pair_doubts(made("/models/gemma-4-E2B-it"), made("/m/gemma-4-E2B-it-assistant", "F8_E4M3"), "q8") == []


def test_coarse_drafters_are_a_doubt() -> None:
    (doubt,) = pair_doubts(made("/models/gemma-4-E2B-it"), made("/models/gemma-4-E2B-it-mtp.gguf", "Q4_0"), "q8")
    assert "4.5 bits" in doubt
    assert pair_doubts(made("/models/gemma-4-E2B-it"), made("/models/gemma-4-E2B-it-mtp.gguf", "Q8_0"), "q8") == []
