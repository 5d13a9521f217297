"""What the native code must answer with an exception, never a crash or a hang: settings, sizes and tensors.

Cases that would corrupt memory if a check were missing run in a forked child, so that a crash is one failed test. Under
`.ci/sanitize` the same tests find what would not crash. Nothing here needs PyTorch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from paceline import _cpu
from paceline.bench.random_weights import random_weights
from paceline.config import TargetConfig
from paceline.quant.recipes import RECIPES
from paceline.types import GREEDY, Draft, SamplingParams, Work
from tests.fixtures.checkpoints import VOCAB
from tests.fixtures.native import (
    DRAFTER_CONFIG,
    ISAS,
    MOE,
    SAMPLED,
    SANITIZED,
    TARGET_CONFIG,
    WILD,
    attempt,
    decoder,
    experts,
    replace,
    rope,
    tensors,
)
from tests.fixtures.processes import in_child

# Settings and sizes


def with_layer(config: Any, index: int, **fields: Any) -> Any:
    layers = list(config.layers)
    layers[index] = replace(layers[index], **fields)
    return replace(config, layers=tuple(layers))


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (replace(TARGET_CONFIG, layers=()), "number of layers is 0"),
        (replace(TARGET_CONFIG, vocab_size=0), "vocab_size is 0"),
        (replace(TARGET_CONFIG, vocab_size=2**31), "vocab_size is 2147483648"),
        (replace(TARGET_CONFIG, hidden_size=-32), "hidden_size is -32"),
        (replace(TARGET_CONFIG, hidden_size=2**64), "hidden_size is too large"),
        (replace(TARGET_CONFIG, heads=0), "heads is 0"),
        (replace(TARGET_CONFIG, heads=2**62), "heads is"),
        (replace(TARGET_CONFIG, sliding_window=2**63 - 17), "sliding_window is"),
        (replace(TARGET_CONFIG, rms_eps=0.0), "rms_eps"),
        (replace(TARGET_CONFIG, rms_eps=float("nan")), "rms_eps"),
        (replace(TARGET_CONFIG, rope_full=rope(1e6, 100.0)), "rotary_factor"),
        (replace(TARGET_CONFIG, rope_full=rope(1e6, 1.5)), "rotary_factor"),
        (replace(TARGET_CONFIG, rope_sliding=rope(1e6, 0.0)), "rotary_factor"),
        (replace(TARGET_CONFIG, rope_sliding=rope(1e6, float("nan"))), "rotary_factor"),
        (replace(TARGET_CONFIG, rope_sliding=rope(0.0)), "theta"),
        (replace(TARGET_CONFIG, rope_sliding=rope(float("inf"))), "theta"),
        (replace(TARGET_CONFIG, rope_sliding=rope(10**400)), "theta is too large"),  # type: ignore[arg-type]
        (replace(TARGET_CONFIG, rope_sliding=rope(1e4, 1.0, 0.0)), "scaling"),
        (replace(TARGET_CONFIG, rope_full=rope(1e4, 1.0, float("nan"))), "scaling"),
        (replace(TARGET_CONFIG, query_pre_attn_scalar=float("nan")), "attention_scale"),
        (replace(TARGET_CONFIG, query_pre_attn_scalar=float("inf")), "attention_scale"),
        (replace(TARGET_CONFIG, softcap=float("nan")), "softcap"),
        (replace(TARGET_CONFIG, softcap=-1.0), "softcap"),
        (replace(TARGET_CONFIG, ple_vocab_size=VOCAB - 1), "ple_vocab_size"),
        (replace(TARGET_CONFIG, ple_size=2**50), "ple_size"),
        (replace(MOE, experts=experts(4, 5, 32)), "active experts is 5"),
        (replace(MOE, experts=experts(4, 0, 32)), "active experts is 0"),
        (replace(MOE, experts=experts(-4, 2, 32)), "experts is -4"),
        (with_layer(TARGET_CONFIG, 0, kv_heads=0), "layer 0: kv_heads is 0"),
        (with_layer(TARGET_CONFIG, 0, kv_heads=-1), "layer 0: kv_heads is -1"),
        (with_layer(replace(TARGET_CONFIG, heads=3), 0, kv_heads=2), "layer 0: 3 heads over 2"),
        (with_layer(TARGET_CONFIG, 0, head_dim=0), "layer 0: head_dim is 0"),
        (with_layer(TARGET_CONFIG, 0, head_dim=48), "layers of one kind with head_dim"),
        (with_layer(TARGET_CONFIG, 0, intermediate_size=0), "layer 0: intermediate_size is 0"),
        (with_layer(TARGET_CONFIG, 0, kv_source=1), "layer 0: kv_source is 1"),
        (with_layer(TARGET_CONFIG, 4, kv_source=99), "layer 4: kv_source is 99"),
        (with_layer(TARGET_CONFIG, 4, kv_source=-1), "layer 4: kv_source is -1"),
        (with_layer(TARGET_CONFIG, 4, kv_source=0), "layer 4: kv_source 0, which has other K/V"),
        (with_layer(TARGET_CONFIG, 3, kv_source=1), "layer 4: kv_source 3, which has no K/V"),
        (DRAFTER_CONFIG, "kv_source is -1"),
    ],
)
def test_settings_that_no_model_has_are_named(config: Any, complaint: str) -> None:
    in_child(lambda: refused(config, complaint))


def refused(config: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        decoder(config, tensors(MOE if getattr(config, "experts", None) else TARGET_CONFIG))


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (replace(DRAFTER_CONFIG, backbone_hidden_size=64), "backbone_hidden_size"),
        (replace(DRAFTER_CONFIG, vocab_size=VOCAB * 2), "vocab"),
        (replace(DRAFTER_CONFIG, centroids=7), "7 centroids"),
        (replace(DRAFTER_CONFIG, centroids=VOCAB + 1), "centroids is"),
        (replace(DRAFTER_CONFIG, centroid_top_k=9), "centroid_top_k is 9"),
        (replace(DRAFTER_CONFIG, centroid_top_k=0), "centroid_top_k is 0"),
        (with_layer(DRAFTER_CONFIG, 0, head_dim=32), "head_dim"),
        (with_layer(DRAFTER_CONFIG, 1, kv_heads=2), "K/V heads"),
        (with_layer(DRAFTER_CONFIG, 1, kv_source=1), "kv_source"),
        (TARGET_CONFIG, "kv_source"),
    ],
)
def test_drafters_that_do_not_fit_are_refused(config: Any, complaint: str) -> None:
    def work() -> None:
        given = tensors(DRAFTER_CONFIG)
        if config.vocab_size >= getattr(config, "centroids", 0):  # tensors of its own
            given = random_weights(config, "q8").tensors
        with pytest.raises(ValueError, match=complaint):
            decoder(drafter=config, drafter_tensors=given)

    in_child(work)


@pytest.mark.parametrize("name", ["threads", "slots", "context", "max_rows"])
@pytest.mark.parametrize("value", [0, -1, 2**31 - 1, 2**31, 2**40, 2**60, 2**63 - 1, 2**63, 2**70, -(2**70), 1.5, "8"])
def test_sizes_are_bounded(name: str, value: object) -> None:
    if name == "threads" and value == 2**31 - 1:
        return  # as many as there can be
    with pytest.raises((ValueError, TypeError)) as caught:
        decoder(**{name: value})
    assert name in str(caught.value)


def test_a_cache_too_large_for_memory_is_a_memory_error() -> None:
    with pytest.raises(MemoryError, match="not enough memory"):
        decoder(context=2**30, slots=8)
    with pytest.raises(ValueError, match="too large"):
        decoder(context=2**30, slots=2**20)


def test_wild_settings_never_crash() -> None:
    in_child(lambda: wild_settings(seed=0, count=40 if SANITIZED else 150))


def wild_settings(seed: int, count: int) -> None:
    random = np.random.default_rng(seed)
    for _ in range(count):
        target, drafter = wild_config(random, TARGET_CONFIG), DRAFTER_CONFIG
        if random.random() < 0.4:
            target, drafter = TARGET_CONFIG, wild_config(random, DRAFTER_CONFIG)
        sizes = {"threads": int(random.integers(1, 4)), "slots": 2, "context": 64, "max_rows": 16}
        if random.random() < 0.3:
            sizes[str(random.choice([*sizes][1:]))] = WILD[random.integers(len(WILD))]
        fitting = [attempt(lambda c=c: small_weights(c)) for c in (target, drafter)]
        given = [fitting[0] or tensors(TARGET_CONFIG), fitting[1] or tensors(DRAFTER_CONFIG)]
        made = attempt(
            lambda t=target, d=drafter, g=given, s=sizes: decoder(t, g[0], d, g[1], isa=str(random.choice(ISAS)), **s)
        )
        if made:
            for work in (Work(0, 0, [1, 2, 3], GREEDY), Work(0, 3, [4], SAMPLED, Draft(length=3))):
                results = attempt(lambda m=made, w=work: m.run([w]))
                assert results is None or all(0 <= token < target.vocab_size for token in results[0][0])


def small_weights(config: Any) -> dict[str, Any]:
    sizes = [config.vocab_size, config.hidden_size, config.heads, getattr(config, "ple_size", 0)]
    sizes += [getattr(config, "backbone_hidden_size", 1), getattr(config, "centroids", 0)]
    for layer in config.layers:
        sizes += [layer.head_dim, layer.kv_heads, layer.intermediate_size]
    if max(sizes) > 70000 or min(sizes) < 0 or np.prod([float(max(1, size)) for size in sizes[:3]]) > 1e7:
        raise ValueError("too large to make")
    return random_weights(config, "q8").tensors


def wild_config(random: np.random.Generator, config: Any) -> Any:
    top = ["vocab_size", "hidden_size", "heads", "sliding_window", "rms_eps", "rope_full", "rope_sliding"]
    if isinstance(config, TargetConfig):
        top += ["softcap", "ple_size", "ple_vocab_size"]
    else:
        top += ["backbone_hidden_size", "centroids", "centroid_top_k"]
    of_layers = ["head_dim", "kv_heads", "intermediate_size", "kv_source"]
    for _ in range(random.integers(1, 3)):
        value: Any = WILD[random.integers(len(WILD))]
        if random.random() < 0.5:
            index = int(random.integers(len(config.layers)))
            config = with_layer(config, index, **{str(random.choice(of_layers)): value})
            continue
        name = str(random.choice(top))
        number = random.choice([float("nan"), float("inf"), -1.0, 0.0, 1e-320, 1e30, 1.0, 1.001, 100.0])
        if name.startswith("rope"):
            fields = [1e4, 1.0, 1.0]
            fields[random.integers(3)] = float(number)
            value = rope(*fields)
        elif name in ("rms_eps", "softcap"):
            value = float(number)
        config = replace(config, **{name: value})
    return config


# Tensors


def without(given: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: tensor for key, tensor in given.items() if key != name}


def test_no_tensors_and_other_tensors_are_named() -> None:
    with pytest.raises(ValueError, match=r"the tensor embed_tokens.scale is missing"):
        decoder(target_tensors={"x": np.ones(1, np.float32)})
    with pytest.raises(ValueError, match=r"the tensor lm_head.weight is missing"):
        decoder(replace(TARGET_CONFIG, tied_head=False), tensors(TARGET_CONFIG))
    with pytest.raises(ValueError, match="is missing"):
        decoder(drafter=DRAFTER_CONFIG, drafter_tensors={"x": np.ones(1, np.float32)})
    with pytest.raises(ValueError, match=r"do not call for the tensor layers.0.extra"):
        decoder(target_tensors=tensors(TARGET_CONFIG) | {"layers.0.extra": np.ones(1, np.float32)})
    keys_as_values = with_layer(TARGET_CONFIG, 1, has_v_proj=False)
    with pytest.raises(ValueError, match=r"do not call for the tensor layers.1.self_attn.v_proj.weight"):
        decoder(keys_as_values, tensors(TARGET_CONFIG))
    with pytest.raises(ValueError, match="do not call for the tensor"):
        decoder(drafter=DRAFTER_CONFIG, drafter_tensors=tensors(DRAFTER_CONFIG) | {"x": np.ones(1, np.float32)})


@pytest.mark.parametrize(
    "tensor", [None, 1, "text", [None], [1], [], b"", np.zeros((2, 2, 2), np.float32), np.zeros(3, np.complex64)]
)
def test_tensors_of_other_kinds_are_refused(tensor: object) -> None:
    for name in ("embed_tokens.weight", "norm.weight", "embed_tokens_per_layer.weight", "layers.0.layer_scalar"):
        with pytest.raises((ValueError, TypeError), match=name):
            decoder(target_tensors=tensors(TARGET_CONFIG) | {name: tensor})
    for part in ("gate_proj", "up_proj", "down_proj"):
        name = f"layers.1.experts.{part}"
        with pytest.raises((ValueError, TypeError), match=name):
            decoder(MOE, tensors(MOE) | {name: tensor})


def test_experts_are_checked() -> None:
    given = tensors(MOE)
    name = "layers.1.experts.up_proj"
    for matrices, complaint in (
        (given[name][:3], "is 3"),
        (given[name] * 2, "is 8"),
        ([*given[name][:3], None], "something else"),
        ([*given[name][:3], _cpu.Matrix("q8_0", 32, 64)], "shape"),
        ([*given[name][:3], _cpu.Matrix("q4_0", 32, 32)], "different formats"),
        ([_cpu.Matrix("f32", 32, 32) for _ in range(4)], "do not go together"),
    ):
        with pytest.raises(ValueError, match=complaint):
            decoder(MOE, given | {name: matrices})
    made = decoder(MOE, given)
    assert len(made.run([Work(0, 0, [1, 2, 3], GREEDY)])[0][0]) == 1


def test_a_drafters_tokens_are_checked() -> None:
    given = tensors(DRAFTER_CONFIG)
    order = given["ordered_head.tokens"]
    for tokens in (order[:-1], np.where(order == 3, VOCAB, order), np.where(order == 3, -2, order), order[:0]):
        with pytest.raises(ValueError, match=r"ordered_head.tokens"):
            decoder(drafter=DRAFTER_CONFIG, drafter_tensors=given | {"ordered_head.tokens": tokens.astype(np.int32)})


def test_a_draft_vocabulary_is_checked() -> None:
    config = replace(DRAFTER_CONFIG, centroids=0, centroid_top_k=0, draft_vocab_size=48)
    given = tensors(config)
    ids = given["draft_token_ids"]
    for tokens in (ids[:-1], np.where(ids == 3, VOCAB, ids), np.where(ids == 3, -1, ids), ids[:0]):
        with pytest.raises(ValueError, match="draft_token_ids"):
            decoder(drafter=config, drafter_tensors=given | {"draft_token_ids": tokens.astype(np.int32)})
    decoder(drafter=config, drafter_tensors=given)
    for size in (0, VOCAB + 1):
        with pytest.raises(ValueError, match="draft_vocab_size"):
            decoder(drafter=replace(config, draft_vocab_size=size), drafter_tensors=given)


def misaligned(array: np.ndarray, offset: int = 1) -> np.ndarray:
    """A copy at an address that is not a multiple of two."""
    memory = np.zeros(array.nbytes + 128, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    view = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def test_arrays_at_odd_addresses() -> None:
    """As a file's header of odd length places them: tables and vectors work, packed matrices are refused."""
    given = tensors(TARGET_CONFIG)
    table = np.random.default_rng(0).integers(0x3C00, 0x3F00, given["embed_tokens_per_layer.weight"].shape, np.uint16)
    works = [Work(0, 0, [1, 2, 3, 4], GREEDY, logits=True)]
    one = decoder(target_tensors=given | {"embed_tokens_per_layer.weight": table}).run(works)[0]
    odd = {name: misaligned(tensor) for name, tensor in given.items() if isinstance(tensor, np.ndarray)}
    odd["embed_tokens_per_layer.weight"] = misaligned(table)
    other = decoder(target_tensors=given | odd).run(works)[0]
    np.testing.assert_array_equal(one[3], other[3])

    source = np.random.default_rng(0).standard_normal((20, 40), np.float32)
    for values in (source, source.astype(np.float16), source.view(np.uint16)[:, :40].copy()):
        plain, packed = _cpu.Matrix("q8_0", 20, 40), _cpu.Matrix("q8_0", 20, 40)
        plain.pack(values)
        packed.pack(misaligned(values))
        np.testing.assert_array_equal(plain.packed(), packed.packed())
    raw = plain.packed()
    assert _cpu.Matrix.mapped("q8_0", 20, 40, misaligned(raw, 0)).shape == (20, 40)
    for offset in (1, 2, 32):
        with pytest.raises(ValueError, match="not a multiple of 64"):
            _cpu.Matrix.mapped("q8_0", 20, 40, misaligned(raw, offset))
    with pytest.raises(ValueError, match="not aligned"):
        _cpu.sample(misaligned(np.ones(20, np.float32)), GREEDY, 0)


def test_matrices_and_kernels_check_their_arguments() -> None:
    for rows, cols in ((0, 1), (-1, 1), (2**62, 4), (4, 2**62), (2**40, 2**40), (2**63 - 1, 1), (1, 2**63 - 1)):
        with pytest.raises((ValueError, MemoryError)):
            _cpu.Matrix("q8_0", rows, cols)
        with pytest.raises(ValueError):  # noqa: PT011
            _cpu.Matrix.mapped("q8_0", rows, cols, np.zeros(64, np.uint8))
    matrix = _cpu.Matrix("f32", 20, 40)
    matrix.pack(np.ones((20, 40), np.float32))
    for first in (-1, 1, 20, 2**63 - 1, -(2**63)):
        with pytest.raises(ValueError, match="rows from row"):
            matrix.pack(np.ones((20, 40), np.float32), first)
    for row in (-1, 20, 2**63 - 1):
        with pytest.raises(IndexError, match="no row"):
            matrix.row(row)
    x = np.ones((3, 40), np.float32)
    for rows in (0, 1, 2, 4):
        with pytest.raises(ValueError, match=f"{rows} rows of out for 3"):
            _cpu.matmul(matrix, x, np.zeros((rows, 32), np.float32))
    for threads in (0, -1):
        with pytest.raises(ValueError, match="threads"):
            _cpu.matmul(matrix, x, np.zeros((3, 32), np.float32), "", threads)
        with pytest.raises(ValueError, match="threads"):
            _cpu.checksum([np.zeros(512, np.uint8)], threads)
    for bad in ({"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 1.5}, {"top_p": float("nan")}):
        params = SamplingParams(seed=0)
        for name, value in bad.items():
            object.__setattr__(params, name, value)  # its own checks are not at issue
        with pytest.raises(ValueError, match="out of range"):
            _cpu.sample(np.ones(20, np.float32), params, 0)
    hot = SamplingParams(temperature=1e300, top_p=0.5, seed=0)
    for isa in ISAS:
        assert 0 <= _cpu.sample(np.array([-3e38, 3e38, np.nan, np.inf] * 8, np.float32), hot, 0, isa) < 32


# Damaged weights: any numbers, no undefined arithmetic


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("quant", RECIPES)
def test_weights_that_are_no_numbers(quant: str, isa: str) -> None:
    in_child(lambda: damaged_weights(quant, isa))


def damaged_weights(quant: str, isa: str) -> None:
    random = np.random.default_rng(0)
    odd = np.array([np.nan, np.inf, -np.inf, 1e38, -1e38, 1e-40, 0.0, 3.4e38], np.float32)
    for share in (0.002, 0.1, 1.0):
        both = []
        for config in (MOE, DRAFTER_CONFIG):
            given: dict[str, Any] = {}
            for name, tensor in random_weights(config, quant).tensors.items():
                if isinstance(tensor, list):
                    given[name] = [damaged(random, matrix, odd, share) for matrix in tensor]
                elif isinstance(tensor, _cpu.Matrix):
                    given[name] = damaged(random, tensor, odd, share)
                elif isinstance(tensor, np.ndarray) and tensor.dtype == np.float32:
                    given[name] = np.where(random.random(tensor.shape) < share / 10, odd[3], tensor).astype(np.float32)
                else:
                    given[name] = tensor
            both.append(given)
        made = decoder(MOE, both[0], DRAFTER_CONFIG, both[1], quant=quant, isa=isa)
        for slot, params in enumerate((GREEDY, SAMPLED)):
            made.run([Work(slot, 0, [1, 2, 3, 4, 5, 6, 7, 8, 9], params)])
            for draft in (Draft(length=4), Draft(length=3, floors=(0.3,) * 3, acceptance=(0.5,) * 16)):
                sampled, drafted, _, logits = made.run(
                    [Work(slot, made.length(slot), [3], params, draft, logits=True)]
                )[0]
                assert all(0 <= token < VOCAB for token in (*sampled, *drafted))
                assert logits.shape == (len(sampled), VOCAB)


def damaged(random: np.random.Generator, matrix: _cpu.Matrix, odd: np.ndarray, share: float) -> _cpu.Matrix:
    rows, cols = matrix.shape
    values = random.standard_normal((rows, cols), np.float32)
    values = np.where(random.random((rows, cols)) < share, random.choice(odd, (rows, cols)), values)
    packed = _cpu.Matrix(matrix.format, rows, cols)
    packed.pack(values.astype(np.float32))
    if matrix.format in ("q8_0", "q4_0") and share == 1.0:  # a file may hold any bytes
        memory = misaligned(random.integers(0, 256, packed.nbytes, np.uint8), 0)
        return _cpu.Matrix.mapped(matrix.format, rows, cols, memory)
    return packed
