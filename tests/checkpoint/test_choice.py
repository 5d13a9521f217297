"""Which GGUF of several, by their names as quantisers publish them."""

import pytest

from paceline.checkpoint import choice
from paceline.checkpoint.choice import GgufFile, choose_drafter, choose_target, gguf_files
from paceline.errors import CheckpointError


def file(name: str) -> GgufFile:
    return GgufFile((name,), 0)


@pytest.mark.parametrize(
    ("name", "tag", "bits", "size"),
    [
        ("gemma-4-E2B-it-Q4_K_M.gguf", "Q4_K_M", 4, "e2b"),
        ("gemma-4-E2B_q4_0-it.gguf", "Q4_0", 4, "e2b"),
        ("gemma-4-E2B_q4_0_it.gguf", "Q4_0", 4, "e2b"),
        ("gemma-4-12b-it-qat-q4_0.gguf", "Q4_0", 4, "12b"),
        ("gemma-4-26B-A4B-it-UD-Q4_K_XL.gguf", "UD-Q4_K_XL", 4, "26b"),
        ("gemma-4-26B-A4B-it.Q4_K_H.gguf", "Q4_K_H", 4, "26b"),
        ("google_gemma-4-31B-it-IQ4_XS.gguf", "IQ4_XS", 4, "31b"),
        ("BF16/gemma-4-31B-it-BF16-00001-of-00002.gguf", "BF16", 16, "31b"),
        ("gemma-4-12B-it-MTP-F16.gguf", "F16", 16, "12b"),
        ("gemma-4-E4B-it-f32.gguf", "F32", 32, "e4b"),
        ("gemma-4-26B-A4B-it-MXFP4_MOE.gguf", "MXFP4_MOE", 4, "26b"),
        ("gemma-3-270m-Q8_0.gguf", "Q8_0", 8, "270m"),
        ("mtp-gemma-4-E2B-it.gguf", "", 0, "e2b"),
        ("model.gguf", "", 0, ""),
    ],
)
def test_what_names_say(name: str, tag: str, bits: int, size: str) -> None:
    one = file(name)
    assert (one.tag, one.bits, one.model_size) == (tag, bits, size)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("gemma-4-E2B-it-Q4_K_M.gguf", "target"),
        ("BF16/gemma-4-E2B-it.gguf", "target"),
        ("mtp-gemma-4-E2B-it.gguf", "drafter"),
        ("MTP/gemma-4-31B-it-Q8_0-MTP.gguf", "drafter"),
        ("gemma-4-E2B-it-assistant.Q8_0.gguf", "drafter"),
        ("gemma-4-E2B-it-qat-assistant-MTP-Q8_0.gguf", "drafter"),
        ("mmproj-BF16.gguf", ""),
        ("gemma-4-E2B-it-mmproj.gguf", ""),
        ("eagle3-gemma-4-31B.gguf", ""),
        ("dflash-gemma-4-31B.gguf", ""),
        ("dspark-gemma-4-31B.gguf", ""),
        ("google_gemma-4-E2B-it-imatrix.gguf", ""),
        ("smtpd-Q4_0.gguf", "target"),  # part of a longer word
    ],
)
def test_kinds(name: str, kind: str) -> None:
    assert (file(name).is_target, file(name).is_drafter) == (kind == "target", kind == "drafter")


@pytest.mark.parametrize(
    ("name", "tag", "has"),
    [
        ("gemma-Q4_K_M.gguf", "q4_k_m", True),
        ("gemma-Q4_K_M.gguf", "Q4_K", False),
        ("gemma-BF16.gguf", "F16", False),
        ("gemma-IQ4_NL.gguf", "Q4_NL", False),
        ("gemma-UD-Q4_K_XL.gguf", "Q4_K_XL", True),
        ("gemma-UD-Q4_K_XL.gguf", "UD-Q4_K_XL", True),
        ("gemma_q4_0_it.gguf", "Q4_0", True),
        ("BF16/gemma-00001-of-00002.gguf", "bf16", True),
        ("gemma.gguf", "g.mma", False),  # a tag is no pattern
    ],
)
def test_tags(name: str, tag: str, has: bool) -> None:
    assert file(name).has_tag(tag) == has


def test_shards_are_one_file() -> None:
    sizes = {
        "b-00002-of-00002.gguf": 2,
        "b-00001-of-00002.gguf": 1,
        "a.gguf": 4,
        "c-00002-of-00003.gguf": 8,
        "d.txt": 16,
    }
    files = gguf_files(sizes)
    assert [(one.name, one.size, one.whole) for one in files] == [
        ("a.gguf", 4, True),
        ("b-00001-of-00002.gguf", 3, True),
        ("c-00002-of-00003.gguf", 8, False),
    ]


@pytest.mark.parametrize(
    ("sizes", "memory", "chosen"),
    [
        ({"m-Q4_0.gguf": 4, "m-Q8_0.gguf": 8, "m-BF16.gguf": 16}, 100, "m-BF16.gguf"),
        ({"m-Q4_0.gguf": 4, "m-Q8_0.gguf": 8, "m-BF16.gguf": 16}, 15, "m-Q8_0.gguf"),
        ({"m-Q4_0.gguf": 4, "m-Q8_0.gguf": 8, "m-BF16.gguf": 16}, 10, "m-Q4_0.gguf"),
        ({"m-Q4_0.gguf": 4, "m-Q8_0.gguf": 8, "m-BF16.gguf": 16}, 1, "m-Q4_0.gguf"),  # none fits
        ({"m-F16.gguf": 16, "m-BF16.gguf": 16, "m-F32.gguf": 32}, 100, "m-BF16.gguf"),
        ({"m-IQ2_XXS.gguf": 2, "m-IQ3_M.gguf": 3, "m-TQ1_0.gguf": 1, "m-Q4_0.gguf": 4}, 5, "m-Q4_0.gguf"),
        ({"m-IQ2_XXS.gguf": 2, "m-IQ3_M.gguf": 3}, 100, "m-IQ3_M.gguf"),  # its reader says what it is
        ({"mmproj-F16.gguf": 1, "mtp-m.gguf": 1}, 100, None),
        ({}, 100, None),
    ],
)
def test_the_best_that_fits(
    sizes: dict[str, int], memory: int, chosen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "available_memory", lambda: memory)
    notices: list[str] = []
    found = choose_target(sizes, "here", notices.append)
    assert (found.name if found else None) == chosen
    assert ("may not fit" in "".join(notices)) == (memory == 1)


def test_several_models_are_no_choice() -> None:
    names = [f"gemma-{number}-Q4_0.gguf" for number in range(20)]
    with pytest.raises(CheckpointError) as caught:
        choose_target(dict.fromkeys(names, 1), "here", lambda _: None)
    assert "several models" in str(caught.value)
    assert "and 12 more" in str(caught.value)


@pytest.mark.parametrize(
    ("target", "names", "chosen"),
    [
        ("m-E2B-Q4_0.gguf", ["mtp-m-E2B-Q8_0.gguf", "mtp-m-E2B-Q4_0.gguf"], "mtp-m-E2B-Q4_0.gguf"),
        ("m-E2B-Q5_K_M.gguf", ["mtp-m-E2B-F16.gguf", "mtp-m-E2B-Q4_0.gguf"], "mtp-m-E2B-Q4_0.gguf"),
        ("m-E2B-Q4_0.gguf", ["mtp-m-E4B-Q4_0.gguf"], None),
        ("m-E2B-Q4_0.gguf", ["mtp-m-E4B-Q4_0.gguf", "mtp-m-E2B-Q8_0.gguf"], "mtp-m-E2B-Q8_0.gguf"),
        ("m-E2B-qat-Q4_0.gguf", ["mtp-m-E2B-Q4_0.gguf", "mtp-m-E2B-qat-F16.gguf"], "mtp-m-E2B-qat-F16.gguf"),
        ("m-E2B-Q4_0.gguf", ["mtp-m-E2B-F16.gguf", "mtp-m-E2B-qat-Q4_0.gguf"], "mtp-m-E2B-F16.gguf"),
        ("a/m-Q4_0.gguf", ["mtp-m-Q4_0.gguf", "a/mtp-m-F16.gguf"], "a/mtp-m-F16.gguf"),
        ("m-Q4_0.gguf", ["MTP/m-F16-MTP.gguf", "MTP/m-Q4_0-MTP.gguf"], "MTP/m-Q4_0-MTP.gguf"),
        ("fine-tune-Q4_0.gguf", ["mtp-m-Q4_0.gguf", "mmproj-m.gguf", "eagle3-m.gguf"], "mtp-m-Q4_0.gguf"),
        ("folder", ["mtp-m-Q4_0.gguf"], "mtp-m-Q4_0.gguf"),
        ("m-Q4_0.gguf", ["other-Q4_0.gguf"], None),
    ],
)
def test_drafters(target: str, names: list[str], chosen: str | None) -> None:
    found = choose_drafter(dict.fromkeys(names, 1), target)
    assert (found.name if found else None) == chosen
