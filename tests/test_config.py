"""Settings of the official shapes, in both spellings, and pairs that do not belong together."""

import copy
import json
from dataclasses import replace
from typing import Any

import pytest

from paceline.checkpoint.config_json import drafter_config, target_config
from paceline.config import LIMITS, Experts, Rope, check_pair
from paceline.errors import CheckpointError, PairError
from tests.fixtures import shapes


@pytest.mark.parametrize(
    ("name", "facts"),
    # layers; sliding and full: head dim, K/V heads; first KV-shared layer; last own sliding and full layer
    [
        ("E2B", (35, (256, 1), (512, 1), 15, 13, 14)),
        ("E4B", (42, (256, 2), (512, 2), 24, 22, 23)),
        ("12B", (48, (256, 8), (512, 1), 48, 46, 47)),
        ("26B-A4B", (30, (256, 8), (512, 2), 30, 28, 29)),
        ("31B", (60, (256, 16), (512, 4), 60, 58, 59)),
    ],
)
def test_official_shapes(name: str, facts: tuple[Any, ...]) -> None:
    config = target_config(shapes.target(name))
    sliding = next(layer for layer in config.layers if layer.sliding)
    full = next(layer for layer in config.layers if not layer.sliding)
    assert facts == (
        len(config.layers),
        (sliding.head_dim, sliding.kv_heads),
        (full.head_dim, full.kv_heads),
        config.first_shared_layer,
        config.last_layer(sliding=True),
        config.last_layer(sliding=False),
    )
    assert config.rope(sliding) == Rope(1e4)
    assert config.rope(full) == Rope(1e6, 0.25)
    assert config.rope(full).rotating_pairs(512) == 64
    assert full.has_v_proj == (name in ("E2B", "E4B"))
    assert sliding.has_v_proj
    assert config.stop_ids == (1, 106)
    assert config.softcap == 30
    check_pair(config, drafter_config(shapes.drafter(name)))


def test_shared_layers() -> None:
    config = target_config(shapes.target("E2B"))
    assert [layer.kv_source for layer in config.layers[:15]] == list(range(15))
    assert {layer.kv_source for layer in config.layers[15:] if layer.sliding} == {13}
    assert {layer.kv_source for layer in config.layers[15:] if not layer.sliding} == {14}
    assert {layer.intermediate_size for layer in config.layers[:15]} == {6144}
    assert {layer.intermediate_size for layer in config.layers[15:]} == {12288}
    assert {layer.intermediate_size for layer in target_config(shapes.target("E4B")).layers} == {10240}


def test_experts_and_ple() -> None:
    assert target_config(shapes.target("26B-A4B")).experts == Experts(128, 8, 704)
    assert target_config(shapes.target("31B")).experts is None
    assert target_config(shapes.target("E2B")).ple_size == 256
    assert target_config(shapes.target("12B")).ple_size == 0


@pytest.mark.parametrize("name", shapes.TEXTS)
def test_the_other_spelling(name: str) -> None:
    """Files written by transformers say per layer what the official ones say with two global settings."""
    for whole, read in ((shapes.target(name), target_config), (shapes.drafter(name), drafter_config)):
        other = copy.deepcopy(whole)
        text = other["text_config"]
        heads = text.pop("num_global_key_value_heads", None)
        override = {"head_dim": text.pop("global_head_dim")}
        if heads is not None and text.get("attention_k_eq_v"):
            override["num_key_value_heads"] = heads
        full = [i for i, kind in enumerate(text["layer_types"]) if kind == "full_attention"]
        text["per_layer_config"] = {f"{i:02}": override for i in full}  # padded as transformers does
        assert read(other) == read(whole)


def test_transformers_agrees() -> None:
    """The layer facts against transformers' own reading of the same file."""
    transformers = pytest.importorskip("transformers")
    for name, text in shapes.TEXTS.items():
        if name == "12B":
            theirs = transformers.Gemma4UnifiedTextConfig(**_without_type(text))
        else:
            theirs = transformers.Gemma4TextConfig(**_without_type(text))
        saved = json.loads(theirs.to_json_string())
        ours, again = target_config(text), target_config(saved)
        assert again.layers == ours.layers
        assert (again.ple_size, again.experts, again.sliding_window) == (
            ours.ple_size,
            ours.experts,
            ours.sliding_window,
        )


def _without_type(text: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in copy.deepcopy(text).items() if key != "model_type"}


def test_a_text_only_checkpoint() -> None:
    assert target_config(shapes.E2B).layers == target_config(shapes.target("E2B")).layers


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ({"hidden_activation": "silu"}, "hidden_activation"),
        ({"attention_bias": True}, "attention_bias"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["linear_attention"] * 35}, "linear_attention"),
        ({"num_key_value_heads": 3}, "8 heads over 3"),
        ({"num_kv_shared_layers": 34}, "shares"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "yarn"),
        ({"rope_parameters": {"full_attention": {"rope_type": "proportional", "factor": 8.0}}}, "proportional"),
        ({"rope_parameters": {"full_attention": {"rope_type": "linear", "partial_rotary_factor": 0.5}}}, "linear"),
        ({"per_layer_config": {"3": 7}}, "per_layer_config of layer 3"),
        ({"per_layer_config": {"3": {"intermediate_size": 0}}}, "intermediate_size is 0"),
        ({"enable_moe_block": True}, "num_experts"),
    ],
)
def test_what_is_not_supported_is_refused(text: dict[str, Any], says: str) -> None:
    config = shapes.target("E2B")
    config["text_config"] = config["text_config"] | text
    with pytest.raises(CheckpointError, match=says) as caught:
        target_config(config)
    assert "\n" not in str(caught.value)


def test_widths_of_single_layers() -> None:
    """Fine-tunes with padded feed-forward layers; a layer's own width is final, double-wide or not."""
    config = copy.deepcopy(shapes.target("E2B"))
    config["text_config"]["per_layer_config"] = {
        "3": {"intermediate_size": 100},
        "04": {"intermediate_size": 200},
        "20": {"intermediate_size": 300},
    }
    config["text_config"].pop("global_head_dim")
    widths = [layer.intermediate_size for layer in target_config(config).layers]
    assert widths == [6144] * 3 + [100, 200] + [6144] * 10 + [12288] * 5 + [300] + [12288] * 14


def test_heads_of_their_own() -> None:
    config = shapes.target("E2B")
    assert target_config(config).tied_head
    untied = config | {"text_config": config["text_config"] | {"tie_word_embeddings": False}}
    assert not target_config(untied).tied_head
    text = {key: value for key, value in config["text_config"].items() if key != "tie_word_embeddings"}
    assert not target_config(config | {"text_config": text, "tie_word_embeddings": False}).tied_head
    drafter = shapes.drafter("E2B")
    drafter["text_config"]["tie_word_embeddings"] = False
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        drafter_config(drafter)


def test_drafter_facts() -> None:
    small, large = drafter_config(shapes.drafter("E2B")), drafter_config(shapes.drafter("31B"))
    assert (small.centroids, small.centroid_top_k, small.backbone_hidden_size) == (2048, 32, 1536)
    assert (large.centroids, large.centroid_top_k, large.backbone_hidden_size) == (0, 0, 5376)
    assert [layer.sliding for layer in small.layers] == [True, True, True, False]
    assert {layer.kv_source for layer in small.layers} == {-1}


@pytest.mark.parametrize("settings", [{"num_centroids": 2047}, {"centroid_intermediate_top_k": 4096}])
def test_impossible_centroids(settings: dict[str, int]) -> None:
    with pytest.raises(CheckpointError, match="centroids"):
        drafter_config(shapes.drafter("E2B") | settings)


@pytest.mark.parametrize(
    ("target", "drafter", "numbers"),
    [
        ("E4B", "E2B", ("1536", "2560")),
        ("E2B", "31B", ("5376", "1536")),
        ("26B-A4B", "12B", ("3840", "2816")),
    ],
)
def test_wrong_pairs(target: str, drafter: str, numbers: tuple[str, str]) -> None:
    assert_no_pair(shapes.target(target), shapes.drafter(drafter), *numbers)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ({"vocab_size": 2048}, ("262144", "2048")),
        ({"sliding_window": 256}, ("512", "256")),
        ({"num_key_value_heads": 2}, ("1", "2")),
        ({"global_head_dim": 256}, ("512", "256")),
        ({"rope_parameters": {"sliding_attention": {"rope_theta": 5.0}}}, ("10000.0", "5.0")),
    ],
)
def test_drafters_that_almost_fit(text: dict[str, Any], numbers: tuple[str, str]) -> None:
    drafter = shapes.drafter("E2B")
    drafter["text_config"] |= text
    assert_no_pair(shapes.target("E2B"), drafter, *numbers)


def assert_no_pair(target: dict[str, Any], drafter: dict[str, Any], *numbers: str) -> None:
    with pytest.raises(PairError) as caught:
        check_pair(target_config(target), drafter_config(drafter))
    message = str(caught.value)
    assert "\n" not in message
    assert all(number in message for number in numbers)
    assert "--drafter none" in message


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"sliding_window": "8"}, "sliding_window is '8'"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps is 'x'"),
        ({"final_logit_softcapping": "x"}, "final_logit_softcapping is 'x'"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
        ({"num_kv_shared_layers": 99}, "num_kv_shared_layers is 99"),
        ({"vocab_size_per_layer_input": 7}, "vocab_size_per_layer_input is 7"),
        ({"eos_token_id": 1.5}, "eos_token_id is 1.5"),
        ({"eos_token_id": [1, 1 << 31]}, "eos_token_id is 2147483648"),
        ({"bos_token_id": 2.5}, "bos_token_id is 2.5"),
        ({"bos_token_id": "x"}, "bos_token_id is 'x'"),
        ({"bos_token_id": -1}, "bos_token_id is -1"),
        (
            {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 5, "moe_intermediate_size": 8},
            "5 of 4 experts",
        ),
    ],
)
def test_values_that_make_no_sense_are_refused(setting: dict[str, Any], says: str) -> None:
    from paceline.bench.shapes import TARGETS

    with pytest.raises(CheckpointError, match=says):
        target_config({**TARGETS["e2b"], **setting})


@pytest.mark.parametrize("name", LIMITS)
def test_every_setting_has_a_least_and_a_most(name: str) -> None:
    drafts = name in DRAFTER_SETTINGS
    whole = copy.deepcopy(shapes.drafter("E2B") if drafts else shapes.target("E2B"))
    if name in ("query_pre_attn_scalar", "sliding_window_pattern"):
        whole |= {"model_type": "gemma3"}
        whole["text_config"]["layer_types"] = None
    read, text = (drafter_config, whole) if drafts else (target_config, whole["text_config"])
    if name in ("num_experts", "top_k_experts", "moe_intermediate_size"):
        text |= {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64}
    if name == "num_global_key_value_heads":
        text["attention_k_eq_v"] = True
    least, most = LIMITS[name]
    for value in (least - 1, -(2**63), most * 2, 2**63 - 17, 2**64, 10**400):
        value = value if isinstance(least, int) else float(min(value, 1e308))
        if name in ("rope_theta", "partial_rotary_factor", "factor"):
            kind = "linear" if name == "factor" else "proportional"
            text["rope_parameters"] = {"full_attention": {"rope_type": kind, name: value}}
        else:
            text[name] = value
        with pytest.raises(CheckpointError, match=name):
            read(whole)


DRAFTER_SETTINGS = ("draft_vocab_size", "backbone_hidden_size", "num_centroids", "centroid_intermediate_top_k")


@pytest.mark.parametrize("value", ["8", 8.0, True, [8], {}, float("nan")])
@pytest.mark.parametrize("name", ["num_attention_heads", "head_dim", "global_head_dim", "hidden_size_per_layer_input"])
def test_only_whole_numbers_are_sizes(name: str, value: object) -> None:
    config = copy.deepcopy(shapes.target("E2B"))
    config["text_config"][name] = value
    with pytest.raises(CheckpointError, match=f"{name} is .*; it must be a whole number"):
        target_config(config)


@pytest.mark.parametrize("name", ["use_double_wide_mlp", "attention_k_eq_v", "enable_moe_block"])
def test_only_true_and_false_are_flags(name: str) -> None:
    for value in ("false", 0, 1, [], 1.0):
        config = copy.deepcopy(shapes.target("E2B"))
        config["text_config"][name] = value
        with pytest.raises(CheckpointError, match=f"{name} is .*; it must be true or false"):
            target_config(config)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 0.0},
        {"rope_theta": float("nan")},
        {"rope_theta": float("inf")},
        {"rope_theta": "1e4"},
        {"partial_rotary_factor": 1.5},
        {"partial_rotary_factor": 100},
        {"partial_rotary_factor": float("nan")},
        {"partial_rotary_factor": -0.1},
        {"rope_type": ["default"]},
        {"factor": float("nan")},
    ],
)
def test_impossible_rotations(rope: dict[str, Any]) -> None:
    config = copy.deepcopy(shapes.target("E2B"))
    given = {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25} | rope
    config["text_config"]["rope_parameters"] = {"full_attention": given}
    with pytest.raises(CheckpointError, match="ro"):
        target_config(config)


@pytest.mark.parametrize("count", [1025, 10**5, 10**12])
def test_no_table_of_layers_is_made_before_their_number_is_checked(count: int) -> None:
    config = copy.deepcopy(shapes.target("E2B"))
    config["text_config"] |= {"num_hidden_layers": count, "layer_types": None, "num_kv_shared_layers": 10}
    with pytest.raises(CheckpointError, match="num_hidden_layers"):
        target_config(config)


def test_settings_that_no_file_spells_pass_the_same_gate() -> None:
    config = target_config(shapes.target("E2B"))
    for wrong in (
        {"layers": ()},
        {"layers": config.layers[:1] * 1025},
        {"layers": (replace(config.layers[0], kv_source=1), *config.layers[1:])},
        {"layers": (replace(config.layers[0], kv_source=-1), *config.layers[1:])},
        {"heads": 0},
        {"stop_ids": (1 << 31,)},
        {"bos_id": -1},
        {"query_pre_attn_scalar": 0.0},
        {"sliding_window": 2**63 - 17},
    ):
        with pytest.raises(CheckpointError):
            replace(config, **wrong)
