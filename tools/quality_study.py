"""What each weight format and recipe costs on a real Gemma 3 model, in float32 but for the weights studied.

    OMP_NUM_THREADS=2 python -m tools.quality_study gemma-3-270m-Q4_K_M.gguf

The reference is the file's own values. Each row of the table has some matrices quantised by paceline's own quantisers:
a recipe, or one format for the layers or the head alone. Columns are bits a weight over all matrices a pass reads, mean
KL divergence from the reference, the share of positions with the same top token, and perplexity; with `--activations`,
the same again with activations in 8 bits, as the CPU's kernels take them. Rows "by importance" searched scales by the
mean squares of activations on the texts of `--calibration`, "compensated" ones moved errors into other columns besides.

Embedding rows that enter the model are the file's own throughout. Texts are those of `paceline eval`.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from tools.error_compensation import GRIDS, importance_of, round_compensated
from torch import Tensor
from torch.nn import functional as F

from paceline import _cpu
from paceline.checkpoint.checkpoint import Checkpoint
from paceline.checkpoint.tensors import TensorRef
from paceline.config import Layer, TargetConfig
from paceline.quant.formats import FORMATS
from paceline.quant.recipes import RECIPES, Stored, mean_bits
from paceline.text.tokenizer import Tokenizer

HEAD = "embed_tokens.weight"
MATRIX = re.compile(r"_proj\.weight$")
SLICE = 8192  # rows quantised at once
ROUNDED = ", rounded to nearest"
METHODS = ("", " by importance", " compensated", ROUNDED)
CHUNK = 128  # positions whose logits are held at once
CALIBRATION = [Path("README.md"), *sorted(Path("docs").glob("*.md")), Path("src/paceline/engine/engine.py")]
Moments = Mapping[str, NDArray[np.float64]]


def values_of(ref: TensorRef) -> Tensor:
    """A tensor's values in float32."""
    rows = ref.read()
    if rows.dtype == np.uint8:
        rows = _cpu.dequantise(np.ascontiguousarray(rows), ref.dtype, ref.shape[-1])
    elif rows.dtype == np.uint16:
        rows = (rows.astype(np.uint32) << 16).view(np.float32)
    return torch.from_numpy(np.array(rows, np.float32).reshape(ref.shape))


def eight_bits(x: Tensor) -> Tensor:
    """Activations as kernels take them: int8 with a scale for 32 columns."""
    groups = x.reshape(*x.shape[:-1], -1, 32)
    scale = groups.abs().amax(-1, keepdim=True) / 127
    return ((groups / scale.clamp_min(1e-30)).round() * scale).reshape(x.shape)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotate(x: Tensor, theta: float) -> Tensor:
    """Rotary embedding of x [batch, heads, positions, head size]."""
    half = x.shape[-1] // 2
    angles = torch.outer(torch.arange(x.shape[2]).float(), theta ** (-torch.arange(half) / half))
    first, second = x[..., :half], x[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


@dataclass
class Model:
    """Gemma 3 in float32. `seen` is called with the name and the activations of each matrix."""

    config: TargetConfig
    weights: Mapping[str, Tensor]
    embedding: Tensor
    activations: Callable[[Tensor], Tensor] = lambda x: x
    seen: Callable[[str, Tensor], None] = lambda name, x: None

    def times(self, x: Tensor, name: str) -> Tensor:
        self.seen(name, x)
        return F.linear(self.activations(x), self.weights[name])

    def norm(self, x: Tensor, name: str) -> Tensor:
        return rms_norm(x, self.weights[name], self.config.rms_eps)

    def hidden(self, ids: Tensor) -> Tensor:
        """Final hidden states [positions of all texts, hidden size] of texts [texts, positions]."""
        width = self.config.hidden_size
        x = self.embedding[ids] * torch.tensor(width**0.5).bfloat16().float()
        for i, layer in enumerate(self.config.layers):
            at = f"layers.{i}."
            attended = self._attention(self.norm(x, at + "input_layernorm.weight"), at + "self_attn.", layer)
            x = x + self.norm(attended, at + "post_attention_layernorm.weight")
            h = self.norm(x, at + "pre_feedforward_layernorm.weight")
            gate = F.gelu(self.times(h, at + "mlp.gate_proj.weight"), approximate="tanh")
            h = self.times(gate * self.times(h, at + "mlp.up_proj.weight"), at + "mlp.down_proj.weight")
            x = x + self.norm(h, at + "post_feedforward_layernorm.weight")
        h = self.norm(x, "norm.weight").reshape(-1, width)
        self.seen(HEAD, h)
        return h

    def _attention(self, h: Tensor, at: str, layer: Layer) -> Tensor:
        texts, n, _ = h.shape
        heads = (texts, n, -1, layer.head_dim)
        q, k, v = (self.times(h, f"{at}{part}_proj.weight").view(heads).transpose(1, 2) for part in ("q", "k", "v"))
        theta = self.config.rope(layer).theta
        q, k = (rotate(self.norm(x, f"{at}{part}_norm.weight"), theta) for x, part in ((q, "q"), (k, "k")))
        scores = (q @ k.transpose(-1, -2)) * self.config.attention_scale
        distance = torch.arange(n)[:, None] - torch.arange(n)
        hidden = (distance < 0) | (distance >= (self.config.sliding_window if layer.sliding else n))
        mixed = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
        return self.times(mixed.transpose(1, 2).reshape(texts, n, -1), at + "o_proj.weight")


@dataclass
class Study:
    """The reference, and what is measured against it."""

    config: TargetConfig
    weights: Mapping[str, Tensor]
    ids: Tensor
    moments: Moments
    reference: Tensor = field(init=False)  # log probabilities in fp16
    matrices: Mapping[str, Stored] = field(init=False)

    def __post_init__(self) -> None:
        h = Model(self.config, self.weights, self.weights[HEAD]).hidden(self.ids)
        self.reference = torch.cat([F.log_softmax(x @ self.weights[HEAD].T, -1).half() for x in torch.split(h, CHUNK)])
        shapes = {name: tuple(w.shape) for name, w in self.weights.items() if name == HEAD or MATRIX.search(name)}
        self.matrices = {name: Stored(shape, "BF16") for name, shape in shapes.items()}

    def quantised(self, name: str, fmt: str, calibrated: int) -> Tensor:
        """The values of a matrix in a format. `calibrated`: a number of METHODS."""
        element, rows = FORMATS[fmt].element, self.weights[name].numpy()
        if fmt == "f32":
            return self.weights[name]
        cols = rows.shape[1]
        more = -cols % 256
        rows, moments = np.pad(rows, ((0, 0), (0, more))), np.pad(self.moments[name], (0, more))

        def part(first: int) -> NDArray[np.float32]:
            x = np.ascontiguousarray(rows[first : first + SLICE])
            if METHODS[calibrated] == ROUNDED:
                blocks = gguf.quants.quantize(x, gguf.GGMLQuantizationType[element])
            elif calibrated == 2 and element in GRIDS:
                blocks = round_compensated(x, element, moments)
            else:
                blocks = _cpu.quantise(x, element, importance_of(moments) if calibrated else None)
            values: NDArray[np.float32] = _cpu.dequantise(blocks, element, x.shape[1])[:, :cols]
            return values

        with ThreadPoolExecutor(2) as pool:
            return torch.from_numpy(np.concatenate(list(pool.map(part, range(0, len(rows), SLICE)))))

    def measure(self, label: str, formats: Mapping[str, str], calibrated: int, activations: bool) -> None:
        """Print one row of the table."""
        chosen = {name: formats.get(name, "f32") for name in self.matrices}
        weights = dict(self.weights) | {name: self.quantised(name, fmt, calibrated) for name, fmt in chosen.items()}
        bits = mean_bits({name: self.matrices[name] for name in formats}, formats)
        row = f"| {label}{METHODS[calibrated]} | {bits:.2f} | {self._losses(weights, lambda x: x)} |"
        print(row + (f" {self._losses(weights, eight_bits)} |" if activations else ""), flush=True)

    def _losses(self, weights: Mapping[str, Tensor], activations: Callable[[Tensor], Tensor]) -> str:
        h = Model(self.config, weights, self.weights[HEAD], activations).hidden(self.ids)
        next_ids = F.pad(self.ids[:, 1:], (0, 1), value=-1).reshape(-1)
        parts: list[Tensor] = []
        for x, r, follows in zip(*(torch.split(t, CHUNK) for t in (h, self.reference, next_ids)), strict=True):
            log_q, log_p = F.log_softmax(activations(x) @ weights[HEAD].T, -1), r.float()
            p = log_p.exp()
            total = p.sum(-1)  # the reference is rounded
            kl = (p * (log_p - log_q)).sum(-1) / total - total.log()
            chosen = -log_q.gather(1, follows.clamp_min(0)[:, None])[:, 0]
            same = (log_q.argmax(-1) == log_p.argmax(-1)).float()
            parts.append(torch.stack([kl, same, chosen.where(follows >= 0, torch.nan)]))
        kl, same, loss = torch.cat(parts, 1)
        return f"{kl.mean():.4f} | {100 * same.mean():.1f} % | {loss.nanmean().exp():.2f}"


def q4_k_m(matrices: Mapping[str, Stored]) -> dict[str, str]:
    """llama.cpp's choice of formats, where all widths are multiples of 256."""
    formats = dict.fromkeys(matrices, "q4_k") | {HEAD: "q6_k"}
    layers = 1 + max(int(name.split(".")[1]) for name in matrices if name != HEAD)
    for i in range(layers):
        if i < layers // 8 or i >= 7 * layers // 8 or (i - layers // 8) % 3 == 2:
            formats |= {f"layers.{i}.self_attn.v_proj.weight": "q6_k", f"layers.{i}.mlp.down_proj.weight": "q6_k"}
    return formats


def second_moments(config: TargetConfig, weights: Mapping[str, Tensor], ids: Tensor) -> Moments:
    """The sum of x x^T over the activations x of each matrix."""
    moments: dict[str, Tensor] = {}

    def seen(name: str, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1])
        moments[name] = moments.get(name, torch.tensor(0.0)) + x.T @ x

    Model(config, weights, weights[HEAD], seen=seen).hidden(ids)
    return {name: m.double().numpy() for name, m in moments.items()}


def batch(tokenizer: Tokenizer, texts: Sequence[str], tokens: int) -> Tensor:
    return torch.tensor([tokenizer.encode(text, bos=True)[:tokens] for text in texts])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=400, help="of each text")
    parser.add_argument("--calibration", type=Path, nargs="+", default=CALIBRATION, help="texts, not those measured on")
    parser.add_argument("--rows", default="", help="measure only rows whose label matches this expression")
    parser.add_argument("--activations", action="store_true", help="measure with activations in 8 bits too")
    parser.add_argument("--compensated", action="store_true", help="round recipes with compensation too: minutes each")
    args = parser.parse_args()
    checkpoint = Checkpoint.open(args.model)
    config = checkpoint.target_config()
    tokenizer = Tokenizer.open(checkpoint.tokenizer, checkpoint.tokenizer_config, checkpoint.config["bos_token_id"])
    weights = {name: values_of(ref) for name, ref in checkpoint.tensors.items()}
    bundled = sorted(files("paceline").joinpath("assets/eval").iterdir(), key=lambda f: f.name)
    texts = [f.read_text() for f in bundled if f.name.endswith(".txt")]
    calibration = [path.read_text() for path in args.calibration]
    with torch.inference_mode():
        ids = batch(tokenizer, texts, args.tokens)
        moments = second_moments(config, weights, batch(tokenizer, calibration, args.tokens))
        study = Study(config, weights, ids, moments)
        print(f"{ids.numel()} positions; bits, then KL, same top token and perplexity; the same with 8-bit activations")
        layers = [name for name in study.matrices if name != HEAD]
        rows: list[tuple[str, dict[str, str], int]] = []
        for calibrated in range(3 if args.compensated else 2):
            rows += [(name, RECIPES[name].formats(study.matrices), calibrated) for name in ("q8", "q6", "q5", "q4")]
        everything = dict.fromkeys(study.matrices, "q4_0")
        rows += [("Q4_0 everywhere", everything, 3), ("llama.cpp's Q4_0", everything | {HEAD: "q8_0"}, 3)]
        rows += [("the mix of llama.cpp's Q4_K_M", q4_k_m(study.matrices), 0)]
        for fmt in ("q4_0", "iq4_xs", "iq4_nl", "q4_1", "q4_k", "q5_0", "q5_k", "q6_k", "q8_0"):
            rows += [(f"layers {fmt}", dict.fromkeys(layers, fmt), 0), (f"head {fmt}", {HEAD: fmt}, 0)]
        for label, formats, calibrated in rows:
            if re.search(args.rows, label):
                start = time.monotonic()
                study.measure(label, formats, calibrated, args.activations)
                print(f"{label}: {time.monotonic() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
