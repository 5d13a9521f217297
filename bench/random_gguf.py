"""A random GGUF file of a Gemma 4 target in an official shape, its tensors of the types that llama.cpp would choose.

    python bench/random_gguf.py e2b|e4b|12b|26b|31b OUT.gguf [--mix Q4_K_M] [--drafter DRAFTER.gguf] [--shared-kv]

Blocks are random bytes with scales that keep the variance of what passes through, drawn once for each type and
repeated, so 3 GB take seconds. The vocabulary has Gemma 4's size, and all that else is in an official file is there,
so loading and running it takes what an official file takes. The drafter is Q8_0. Needs the package gguf.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf_file import Part, add_text_settings, rope_part, write_parts
from numpy.typing import NDArray
from random_checkpoint import ALWAYS
from random_vocabulary import CONTROLS, RandomVocabulary, random_vocabulary

import paceline
from paceline.bench.shapes import TARGETS, drafter_settings
from paceline.checkpoint.config_json import drafter_config, target_config
from paceline.checkpoint.gguf_model import GLOBAL, LAYER
from paceline.checkpoint.names import TOKEN_ORDERING, expected_tensors

BLOCKS_DRAWN = 65_537  # of each type; a prime, so that rows differ
TEMPLATE = Path(paceline.__file__).parent / "assets" / "tiny-python" / "chat_template.jinja"  # Gemma 4's turns

# Where a block has its scale, and its minimum, if any, as a multiple of the scale that makes the mean zero.
SCALES: dict[Type, tuple[int, float]] = {
    Type.Q4_0: (0, 0),
    Type.Q4_1: (0, -7.5),
    Type.Q5_0: (0, 0),
    Type.Q5_1: (0, -15.5),
    Type.Q8_0: (0, 0),
    Type.Q4_K: (0, 7.5),
    Type.Q5_K: (0, 15.5),
    Type.Q6_K: (208, 0),
    Type.IQ4_NL: (0, 0),
    Type.IQ4_XS: (0, 0),
}
# For rows that are no whole number of 256 columns.
FALLBACK = {Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1, Type.Q6_K: Type.Q8_0, Type.IQ4_XS: Type.IQ4_NL}


class Mix(NamedTuple):
    """Types of a file's matrices: most of them, and those that are better in layers where it matters most.

    Attributes:
        common: all others.
        better: values and down projections of the layers that `some` names.
        some: "first": down projections of the first eighth, and values of the first four layers; "spread": of the
            first and last eighth, and every third between; "values": all values; "": none.
        embedding: token embedding and per-layer embeddings.
    """

    common: Type
    better: Type = Type.Q6_K
    some: str = ""
    embedding: Type = Type.Q6_K


MIXES = {
    "Q4_0": Mix(Type.Q4_0),
    "Q4_1": Mix(Type.Q4_1),
    "Q4_K_S": Mix(Type.Q4_K, Type.Q5_K, "first"),
    "Q4_K_M": Mix(Type.Q4_K, Type.Q6_K, "spread"),
    "Q5_0": Mix(Type.Q5_0),
    "Q5_1": Mix(Type.Q5_1),
    "Q5_K_S": Mix(Type.Q5_K),
    "Q5_K_M": Mix(Type.Q5_K, Type.Q6_K, "spread"),
    "Q6_K": Mix(Type.Q6_K),
    "Q8_0": Mix(Type.Q8_0, embedding=Type.Q8_0),
    "IQ4_NL": Mix(Type.IQ4_NL, Type.Q5_K, "values"),
    "IQ4_XS": Mix(Type.IQ4_XS, Type.Q5_K, "values"),
}


def tensor_types(shapes: Mapping[str, tuple[int, ...]], mix: Mix) -> dict[str, Type]:
    """The type of each tensor by canonical name, by the rules of llama.cpp's `src/llama-quant.cpp`."""
    types = {}
    values = [name for name in shapes if name.endswith("v_proj.weight")]
    downs = [name for name in shapes if name.endswith(("mlp.down_proj.weight", "experts.down_proj"))]
    layers = 1 + max(int(name.split(".")[1]) for name in downs)
    better = {name for index, name in enumerate(values) if _is_better(mix.some, index, len(values), first=4)}
    for name in downs:
        index = int(name.split(".")[1])
        if mix.some != "values" and _is_better(mix.some, index, layers, first=layers // 8):
            better.add(name)
    for name, shape in shapes.items():
        if name == TOKEN_ORDERING:
            types[name] = Type.I32
        elif len(shape) == 1 or name.endswith("router.proj.weight"):
            types[name] = Type.F32
        elif name.startswith("per_layer_model_projection"):
            types[name] = Type.BF16
        else:
            kind = mix.embedding if name.startswith("embed_tokens") else mix.better if name in better else mix.common
            whole = shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
            types[name] = kind if whole else FALLBACK[kind]
    return types


def _is_better(some: str, index: int, count: int, *, first: int) -> bool:
    if some == "spread":
        return index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2
    return some == "values" or (some == "first" and index < first)


class RandomData:
    """Bytes of random tensors, taken one after the other from what was drawn once for each type and scale."""

    def __init__(self) -> None:
        self._random = np.random.default_rng(0)
        self._drawn: dict[tuple[Type, int], NDArray[np.uint8]] = {}
        self._next = 0

    def write(self, file: BinaryIO, *, kind: Type, shape: tuple[int, ...]) -> None:
        """Write a matrix, or several, whose products keep the variance of what they are multiplied with."""
        columns, (block, size) = shape[-1], gguf.GGML_QUANT_SIZES[kind]
        if (kind, columns) not in self._drawn:
            self._drawn[kind, columns] = self._draw(kind, columns**-0.5)
        left = int(np.prod(shape, dtype=np.int64)) // block * size
        drawn = memoryview(self._drawn[kind, columns])
        at = self._next % (len(drawn) // size) * size
        while left:
            taken = drawn[at : at + left]
            file.write(taken)
            left -= len(taken)
            at = 0
        self._next += 7919  # the next matrix begins elsewhere

    def _draw(self, kind: Type, deviation: float) -> NDArray[np.uint8]:
        if kind not in SCALES:
            values = self._random.standard_normal(BLOCKS_DRAWN, np.float32) * np.float32(deviation)
            return gguf.quantize(values, kind).reshape(-1).view(np.uint8)
        blocks = self._random.integers(0, 256, (BLOCKS_DRAWN, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
        self._set_scales(blocks, kind, 1.0)
        unit = gguf.dequantize(blocks[:1000], kind).std()
        self._set_scales(blocks, kind, deviation / unit)
        return blocks.reshape(-1)

    def _set_scales(self, blocks: NDArray[np.uint8], kind: Type, scale: float) -> None:
        at, minimum = SCALES[kind]
        scales = (scale * self._random.uniform(0.5, 1.5, (len(blocks), 1))).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8)
        if minimum:
            blocks[:, at + 2 : at + 4] = (scales * np.float16(minimum)).view(np.uint8)


def write_target(
    out: Path, config: Mapping[str, Any], mix: str, vocabulary: RandomVocabulary, shared_kv: bool = False
) -> None:
    """Write a target.

    Args:
        out: the file.
        config: as in `config.json`; its `vocab_size` is that of the vocabulary.
        mix: one of `MIXES`.
        vocabulary: goes into the file.
        shared_kv: whether layers that share keys and values have matrices for them, too, as in older exports: nobody
            multiplies with them, but ik_llama.cpp wants them.
    """
    settings = ALWAYS | config
    target = target_config(settings)
    shapes = expected_tensors(target)
    for index, layer in enumerate(target.layers if shared_kv else ()):
        for name in ("k_proj.weight", "v_proj.weight", "k_norm.weight"):
            source = f"layers.{layer.kv_source}.self_attn.{name}"
            if source in shapes:
                shapes[f"layers.{index}.self_attn.{name}"] = shapes[source]
    parts = _parts(shapes, MIXES[mix], settings)

    def add_settings(writer: gguf.GGUFWriter) -> None:
        add_text_settings(writer, settings)
        _add_vocabulary(writer, vocabulary)
        writer.add_chat_template(TEMPLATE.read_text())
        writer.add_int32("general.sampling.top_k", 64)
        writer.add_float32("general.sampling.top_p", 0.95)
        writer.add_float32("general.sampling.temp", 1.0)

    write_parts(out, "gemma4", add_settings, parts)


def write_drafter(out: Path, config: Mapping[str, Any], vocabulary: RandomVocabulary) -> None:
    """Write a drafter in Q8_0, in llama.cpp's dialect with a head through centroids where the config has one."""
    text = ALWAYS | {"max_position_embeddings": 131_072, "num_kv_shared_layers": 4} | config["text_config"]
    shapes = expected_tensors(drafter_config({**config, "text_config": text}))

    def add_settings(writer: gguf.GGUFWriter) -> None:
        add_text_settings(writer, text)
        writer.add_uint32("gemma4-assistant.embedding_length_out", config["backbone_hidden_size"])
        writer.add_uint32("gemma4-assistant.nextn_predict_layers", text["num_hidden_layers"])
        if config["use_ordered_embeddings"]:
            writer.add_uint32("gemma4-assistant.centroid_top_k", config["centroid_intermediate_top_k"])
        _add_vocabulary(writer, vocabulary)

    write_parts(out, "gemma4-assistant", add_settings, _parts(shapes, MIXES["Q8_0"], text))


def _parts(shapes: Mapping[str, tuple[int, ...]], mix: Mix, text: Mapping[str, Any]) -> list[Part]:
    data, names = RandomData(), {canonical: name for name, canonical in reversed(GLOBAL.items())}
    layer_names = {canonical: name for name, canonical in reversed(LAYER.items())}
    parts = [rope_part(text)]
    for name, kind in tensor_types(shapes, mix).items():
        shape = shapes[name]
        stored = names.get(name)
        if stored is None:
            _, index, rest = name.split(".", 2)
            stored = f"blk.{index}.{layer_names[rest]}"
        if name == TOKEN_ORDERING:
            write = np.random.default_rng(0).permutation(shape[0]).astype(np.int32).tofile
        elif len(shape) == 1:
            # small norms behind blocks keep rows as different as their tokens, as in paceline.bench.random_weights
            write = np.full(shape, 0.05 if "post_" in name else 1, np.float32).tofile
        else:
            write = partial(data.write, kind=kind, shape=shape)
        parts.append(Part(stored, shape, kind, write))
    return parts


def _add_vocabulary(writer: gguf.GGUFWriter, vocabulary: RandomVocabulary) -> None:
    writer.add_tokenizer_model("gemma4")
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_scores([-1000.0] * len(vocabulary.tokens))
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_bos_token_id(CONTROLS["<bos>"])
    writer.add_eos_token_id(CONTROLS["<turn|>"])
    writer.add_pad_token_id(CONTROLS["<pad>"])
    writer.add_unk_token_id(vocabulary.tokens.index("<unk>"))
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=TARGETS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--mix", choices=MIXES, default="Q4_K_M", help="types of tensors (Q4_K_M)")
    parser.add_argument("--drafter", type=Path, help="write the shape's drafter to this file, too")
    parser.add_argument("--shared-kv", action="store_true", help="unused matrices, too, which ik_llama.cpp wants")
    given = parser.parse_args()
    vocabulary = random_vocabulary()
    write_target(given.out, TARGETS[given.shape], given.mix, vocabulary, given.shared_kv)
    if given.drafter:
        write_drafter(given.drafter, drafter_settings(given.shape), vocabulary)


if __name__ == "__main__":
    main()
