"""Sampling: the native sampler against its NumPy reference, the noise against published answers."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline import _cpu
from paceline.decode import sampler as twin
from paceline.types import SamplingParams

ISAS = _cpu.usable_isas()
MOST = 20_000  # logits a row
SEEDS = st.one_of(st.integers(0, 3), st.integers(0, 2**64 - 1))
POSITIONS = st.one_of(st.integers(0, 1000), st.integers(0, 2**32 - 1))


# --- the native sampler and its twin


@st.composite
def rows(draw: st.DrawFn) -> np.ndarray:
    """Logits as models give them, and as they do not: ties, ranks one bit apart, wide, flat, damaged."""
    size = draw(st.one_of(st.integers(1, 200), st.integers(1, MOST), st.sampled_from([15, 16, 17, 63, 64, 65, 4096])))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["normal", "rounded", "equal", "wide", "steps", "peaked", "huge"]))
    x = random.standard_normal(size).astype(np.float32) * np.float32(draw(st.sampled_from([0.01, 1.0, 5.0, 30.0])))
    if kind == "rounded":
        x = np.round(x)
    elif kind == "equal":
        x = np.full(size, x[0])
    elif kind == "wide":
        x = x * np.float32(1e4)
    elif kind == "steps":  # neighbours in float32
        x = (np.float32(1).view(np.int32) + random.integers(-3, 4, size).astype(np.int32)).view(np.float32)
    elif kind == "peaked":
        x[random.integers(size)] += 40
    elif kind == "huge":
        x = np.clip(x, -9, 9) * np.float32(3.7e37)  # differences overflow
    odd = [-np.inf, np.inf, np.nan, -0.0, 0.0, -3e38, 3e38, -3.4e38, 3.4e38]
    for value in draw(st.lists(st.sampled_from(odd), max_size=3)):
        share = draw(st.sampled_from([0.0, 0.1, 0.9, 1.0]))
        x[random.random(size) < share] = value
    return np.ascontiguousarray(x, np.float32)


@st.composite
def truncations(draw: st.DrawFn) -> SamplingParams:
    """Everything a draw looks at, the ends of each range included."""
    return SamplingParams(
        temperature=draw(st.one_of(st.sampled_from([1e-4, 0.3, 0.7, 1.0, 1.5, 100.0]), st.floats(1e-4, 100.0))),
        top_k=draw(st.one_of(st.just(0), st.integers(1, 100), st.integers(1, MOST + 1))),
        top_p=draw(st.one_of(st.sampled_from([0.0, 0.5, 0.95, 1 - 1e-9, 1 - 2**-53, 1.0, 1.0]), st.floats(0, 1))),
        min_p=draw(st.one_of(st.sampled_from([0.0, 0.0, 0.05, 1e-30, 5e-324, 1.0]), st.floats(0, 1))),
        seed=draw(SEEDS),
    )


@pytest.mark.slow
@settings(max_examples=2500, deadline=None)
@given(logits=rows(), params=truncations(), positions=st.lists(POSITIONS, min_size=1, max_size=4))
def test_native_sampler_matches_reference(logits: np.ndarray, params: SamplingParams, positions: list[int]) -> None:
    ids, weights = twin.allowed(logits, params)
    assert len(set(ids.tolist())) == len(ids) == len(weights) >= 1
    for position in positions:
        expected = twin.sample(logits, params, position)
        assert expected in ids
        assert {isa: _cpu.sample(logits, params, position, isa) for isa in ISAS} == dict.fromkeys(ISAS, expected)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [65_537, 131_072, 262_144])
def test_vocabularies_of_official_size(isa: str, size: int) -> None:
    """Rows this long are looked at in longer stretches."""
    random = np.random.default_rng(size)
    for trial in range(24):
        logits = (random.standard_normal(size) * [1, 4][trial % 2]).astype(np.float32)
        if trial % 3 == 0:
            logits = np.round(logits * 8) / np.float32(8)
        s = SamplingParams([0.3, 1.0, 3.0][trial % 3], [0, 64, 5000][trial // 3 % 3], [1.0, 0.95][trial // 2 % 2])
        s = replace(s, min_p=[0.0, 0.0, 0.02][trial // 4 % 3], seed=trial)
        for position in (trial, trial + 1000):
            assert _cpu.sample(logits, s, position, isa) == twin.sample(logits, s, position)


@pytest.mark.parametrize("isa", ISAS)
def test_the_ends_of_each_range(isa: str) -> None:
    logits = np.array([1, 3, 2, 3, -np.inf, np.nan], np.float32)

    def allowed(**truncation: float) -> list[int]:
        s = SamplingParams(temperature=1.0, **truncation)
        ids = sorted(twin.allowed(logits, s)[0].tolist())
        for position in range(50):
            assert _cpu.sample(logits, s, position, isa) == twin.sample(logits, s, position)
        return ids

    assert allowed() == [0, 1, 2, 3, 4, 5]
    assert allowed(top_k=1) == [1]  # of equals the lowest
    assert allowed(top_k=2) == [1, 3]
    assert allowed(top_k=6) == allowed(top_k=10**9) == [0, 1, 2, 3, 4, 5]
    assert allowed(top_p=0.0) == [1]  # never less than one token
    assert allowed(min_p=1.0) == [1, 3]  # as likely as the best
    assert allowed(top_p=0.0, min_p=1.0) == [1]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [-np.inf, np.nan, -3e38])
def test_a_row_of_nothing(isa: str, value: float) -> None:
    """Damaged weights may leave no logit at all; all tokens are then equal."""
    for size in (1, 2, 17, 100, 4100):
        logits = np.full(size, value, np.float32)
        s = SamplingParams(temperature=1.0, top_p=0.5, seed=0)
        assert sorted(twin.allowed(logits, s)[0].tolist()) == list(range((size + 1) // 2))
        for position in range(20):
            assert _cpu.sample(logits, s, position, isa) == twin.sample(logits, s, position)


@pytest.mark.parametrize("how", ["twin", *ISAS])
@pytest.mark.parametrize("truncation", ["", "top_p=0.9", "top_k=5, top_p=0.9", "min_p=0.1"])
def test_an_infinite_logit_wins(how: str, truncation: str) -> None:
    """A bias of 1e39, or a penalty that small, makes one; in a process of its own, since it may end there."""
    sampled = "sample(x, s, 3)" if how == "twin" else f"_cpu.sample(x, s, 3, {how!r})"
    code = f"""
import numpy as np
from paceline import _cpu
from paceline.decode.sampler import sample
from paceline.types import SamplingParams
x = np.arange(100, dtype=np.float32)
x[70] = np.inf
s = SamplingParams(temperature=1.0, seed=1, {truncation})
assert {sampled} == 70
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_nucleus_is_the_smallest_sufficient_prefix() -> None:
    """Against the definition, in float64; the share is put between two sums, where rounding cannot matter."""
    random = np.random.default_rng(1)
    for _ in range(50):
        logits = (random.standard_normal(300) * 3).astype(np.float32)
        p = np.exp(logits.astype(np.float64) - logits.max())
        order = np.argsort(-p)
        sums = np.cumsum(p[order] / p.sum())
        count = int(random.integers(1, 100))
        share = float((sums[count - 1] + (sums[count - 2] if count > 1 else 0.0)) / 2)
        ids, weights = twin.allowed(logits, SamplingParams(1.0, top_p=share))
        assert ids.tolist() == order[:count].tolist()
        np.testing.assert_allclose(weights / 2**30, p[ids], atol=2e-7)  # the two exponentials differ by a few ulp


def test_without_temperature_the_first_of_the_best() -> None:
    assert twin.sample(np.array([1, 5, 5, 2], np.float32), SamplingParams(seed=9), 3) == 1


# --- the noise


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 word by word, as Random123 writes it down."""
    (c0, c1, c2, c3), (k0, k1), low = counter, key, 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & low, (p0 >> 32) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_the_reference_gives_the_published_answers(counter: str, key: str, answer: str) -> None:
    """Known answers of the Random123 distribution: they vouch for the reference above, and that for ours."""
    words = [[int(word, 16) for word in text.split()] for text in (counter, key, answer)]
    assert philox(words[0], words[1]) == words[2]
    if words[0][2:] == [0, 0]:  # ours has no use for the other words of the counter
        ours = twin._philox(np.array([words[0][0]], np.uint32), words[0][1], words[1][0] | words[1][1] << 32)
        assert [int(word[0]) for word in ours] == words[2]


@settings(max_examples=300, deadline=None)
@given(
    counters=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=4),
    position=POSITIONS,
    seed=SEEDS,
)
def test_our_philox_is_the_reference(counters: list[int], position: int, seed: int) -> None:
    ours = np.array(twin._philox(np.array(counters, np.uint32), position, seed))
    key = [seed & 0xFFFFFFFF, seed >> 32]
    assert ours.T.tolist() == [philox([counter, position, 0, 0], key) for counter in counters]


def test_each_token_has_a_word_of_its_own() -> None:
    ids = np.arange(4096, dtype=np.int32)
    bits = twin.uniform_bits(5, 77, ids)
    for token in (0, 1, 15, 16, 47, 63, 64, 100, 4095):
        assert bits[token] == philox([16 * (token // 64) + token % 16, 77, 0, 0], [5, 0])[token // 16 % 4]
    assert len(set(bits.tolist())) == len(ids)


def test_the_noise_has_the_moments_of_gumbel() -> None:
    noise = twin.gumbel(1, 0, np.arange(1_000_000, dtype=np.int32)).astype(np.float64)
    assert noise.mean() == pytest.approx(0.5772157, abs=4 * math.pi / math.sqrt(6e6))
    assert noise.var() == pytest.approx(math.pi**2 / 6, abs=4 * 2.1 * math.pi**2 / 6 / 1e3)  # kurtosis 5.4
    for quantile in (1e-5, 1e-3, 0.1, 0.5, 0.9, 0.999, 1 - 1e-5):
        below = (noise < -math.log(-math.log(quantile))).mean()
        assert below == pytest.approx(quantile, abs=4 * math.sqrt(quantile * (1 - quantile) / 1e6))


@pytest.mark.parametrize("bits", [0, 1, 2, 3, 2**30, 2**31 - 1, 2**31, 2**32 - 256, 2**32 - 2, 2**32 - 1])
def test_the_noise_is_right_at_its_ends(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twin, "uniform_bits", lambda *_: np.array([bits], np.uint32))
    u = min((np.float32(bits >> 1) + np.float32(0.5)) * np.float32(2**-31), np.float32(1 - 2**-24))
    noise = float(twin.gumbel(0, 0, np.zeros(1, np.int32))[0])
    assert noise == pytest.approx(-math.log(-math.log1p(-float(u))), abs=1e-6, rel=1e-6)


@pytest.mark.parametrize("isa", ISAS)
def test_native_noise_matches_reference(isa: str) -> None:
    """Of two tokens with noise g and h the first wins while it is less than h - g behind: to the last bit."""
    s = SamplingParams(temperature=1.0, seed=11)
    for position in range(300):
        g, h = twin.gumbel(11, position, np.array([0, 1], np.int32))
        for behind in np.float32(max(g, h) - min(g, h)) + np.arange(-3, 4, dtype=np.float32) * np.float32(1e-7):
            logits = np.array([0, -behind] if h > g else [-behind, 0], np.float32)
            assert _cpu.sample(logits, s, position, isa) == twin.sample(logits, s, position)


def test_noise_depends_on_seed_position_and_token_only() -> None:
    ids = np.arange(2000, dtype=np.int32)
    base = twin.gumbel(7, 50, ids)
    some = np.random.default_rng(0).permutation(ids)[:300]
    np.testing.assert_array_equal(twin.gumbel(7, 50, some), base[some])  # not on the others asked for
    np.testing.assert_array_equal(twin.gumbel(7, 50, ids), base)  # nor on earlier calls
    changes = [(8, 50), (7 + 2**32, 50), (7, 51), (50, 7), (0, 57)]
    others = [base, *(twin.gumbel(*change, ids) for change in changes)]
    correlations = np.corrcoef(np.array(others)) - np.eye(len(others))
    assert np.abs(correlations).max() < 4.5 / math.sqrt(len(ids))


@settings(max_examples=200, deadline=None)
@given(sampling=truncations(), position=st.integers(0, 1000), seed=st.integers(0, 999))
def test_tokens_that_are_not_allowed_do_not_matter(sampling: SamplingParams, position: int, seed: int) -> None:
    """The sampled token is the same with all other tokens removed: this is what couples drafter and target."""
    logits = np.random.default_rng(seed).standard_normal(200).astype(np.float32)
    ids, _ = twin.allowed(logits, sampling)
    bare = np.full(200, -np.inf, np.float32)
    bare[ids] = logits[ids]
    free = SamplingParams(temperature=sampling.temperature, seed=sampling.seed)
    token = twin.sample(logits, sampling, position)
    assert twin.sample(bare, free, position) == token
    assert _cpu.sample(bare, free, position) == token
