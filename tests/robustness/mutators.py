"""Mutations of model files: one function a kind of file, each a pure function of its random generator."""

from __future__ import annotations

import copy
import json
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from tests.robustness import bases
from tests.robustness.gguf_mutators import Raw, mutated
from tests.robustness.templates import BOMBS, FRAGMENTS

BIG = 1 << 20
NUMBERS: list[Any] = [
    *(0, 1, -1, 2, 3, 7, 8, 15, 16, 17, 32, 64, 100, 255, 256, 511, 1000, 1024, 4096, 65535, 65536),
    *(10**6, 2**24, 2**24 + 1, 2**31 - 1, 2**31, 2**32, 2**32 + 1, 2**59, 2**60, 2**62, 2**63 - 17, 2**63 - 1),
    *(2**63, 2**64, -(2**31), -(2**63), 10**30, int("7" * 4000)),
]
FLOATS: list[Any] = [
    *(0.0, 0.5, 1.0, 1.5, 4.0, 100.0, 1e6, 1e-30, 1e-45, 1e38, 1e39, 1e300, -1.0, -0.0),
    *(float("nan"), float("inf"), float("-inf")),
]
OTHERS: list[Any] = [None, True, False, "", "x", "8", "512", "NaN", [], {}, [1], [None], {"a": 1}, [[[[]]]], "x" * 5000]


@dataclass
class Case:
    """What is loaded: a folder, and arguments of `paceline.load`."""

    model: Path
    arguments: dict[str, Any] = field(default_factory=dict)
    must_load: bool = False  # nothing that matters was changed
    text_is_known: bool = False  # and the text must be that of the unchanged `edge`
    cache: Path | None = None  # folder of kept packs


Mutator = Callable[[Random, Path, Path], Case]  # random numbers, folder of the bases, folder for the case


def wild(dice: Random) -> Any:
    """A value that a setting may have by accident or malice."""
    return copy.deepcopy(dice.choice(dice.choice((NUMBERS, FLOATS, OTHERS))))


def nudged(dice: Random, value: Any) -> Any:
    """Something near a value, or something wild."""
    if dice.random() < 0.4:
        return wild(dice)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        inexact = float(value) if abs(value) < 1e300 else 0.5
        steps = (value + 1, value - 1, value * 2, value // 2, value * 3, -value, value + 16, inexact, str(value))
        return dice.choice(steps)
    if isinstance(value, str):
        return dice.choice((value + "x", value[:-1], value.upper(), "", value * 50, "\x00" + value, "\ud800"))
    if isinstance(value, list) and value:
        return dice.choice((value[:-1], value + value[-1:], value * 2, value[::-1], [wild(dice), *value[1:]]))
    return wild(dice)


def change(dice: Random, tree: Any, times: int = 1) -> None:
    """Change values anywhere in a tree of JSON, in place: nudge, delete, rename, swap or add."""
    for _ in range(times):
        node = tree
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = dice.choice(keys)
            if isinstance(node[key], dict | list) and node[key] and dice.random() < 0.8:
                node = node[key]
                continue
            act = dice.random()
            if act < 0.7:
                node[key] = nudged(dice, node[key])
            elif act < 0.8:
                del node[key]
            elif act < 0.9:
                other = dice.choice(keys)
                node[key], node[other] = node[other], node[key]
            elif isinstance(node, dict):
                node[dice.choice(("", "x", f"{key}x", "__class__"))] = node.pop(key)
            else:
                node.insert(key, wild(dice))
            break


def rewrite(path: Path, dice: Random, times: int = 1) -> None:
    tree = json.loads(path.read_bytes())
    change(dice, tree, times)
    path.write_text(json.dumps(tree))


def damage(path: Path, dice: Random) -> None:
    """Flip, cut, insert or repeat bytes of a file."""
    data = bytearray(path.read_bytes())
    for _ in range(dice.choice((1, 1, 2, 8))):
        at = dice.randrange(min(len(data), dice.choice((16, 200, 4096, BIG)))) if data else 0
        act = dice.randrange(5)
        if act == 0 and data:
            data[at] ^= 1 << dice.randrange(8)
        elif act == 1:
            del data[at:]
        elif act == 2:
            del data[at : at + dice.choice((1, 2, 7, 64))]
        elif act == 3:
            data[at:at] = dice.choice(
                (b"\x00", b"\xff" * 8, b"{", b'"', b"\\u0000", b"1e999", b"-", data[at : at + 50])
            )
        else:
            data[at : at + 8] = dice.choice((0, 1, 8, 2**31, 2**40, 2**63, 2**64 - 1)).to_bytes(8, "little")
    path.write_bytes(data)


def unchanged(dice: Random, root: Path, to: Path) -> Case:
    return Case(
        bases.copy(root, dice.choice(("edge", "moe", "sharded", "q8", "q4", "gguf", "parts")), to), must_load=True
    )


def config(dice: Random, root: Path, to: Path) -> Case:
    model = bases.copy(root, dice.choice(("edge", "moe")), to)
    path = (model if dice.random() < 0.75 else to / "model-assistant") / "config.json"
    if dice.random() < 0.1:
        damage(path, dice)
    else:
        rewrite(path, dice, dice.choice((1, 1, 1, 2, 4)))
    return Case(model)


def rope(dice: Random, root: Path, to: Path) -> Case:
    model = bases.copy(root, "edge", to)
    for folder in ("model", "model-assistant") if dice.random() < 0.7 else ("model",):
        path = to / folder / "config.json"
        tree = json.loads(path.read_bytes())
        state = dice.getstate()
        change(dice, tree["text_config"]["rope_parameters"], dice.choice((1, 2)))
        if folder == "model":
            dice.setstate(state)  # the same change in the drafter, so that the pair still fits
        path.write_text(json.dumps(tree))
    return Case(model)


def sizes(dice: Random, root: Path, to: Path) -> Case:
    model = bases.copy(root, dice.choice(("edge", "moe")), to)
    path = model / "config.json"
    tree = json.loads(path.read_bytes())
    text = tree["text_config"]
    size = dice.choice([*NUMBERS, 10**5, 10**12, 20000])
    keys = ("max_position_embeddings", "sliding_window", "num_hidden_layers", "vocab_size", "num_attention_heads")
    only_arguments = dice.random() < 0.5
    if not only_arguments:
        text[dice.choice(keys)] = size
    if not only_arguments and dice.random() < 0.3:
        text.pop("layer_types", None)
        text["num_kv_shared_layers"] = dice.choice((0, 1, 10000))
    path.write_text(json.dumps(tree))
    name = dice.choice(("context", "prompt_chunk", "slots", "threads", "cache_memory", "most_waiting"))
    return Case(model, {name: dice.choice([*NUMBERS, *FLOATS, "x", True])} if only_arguments else {})


def safetensors(dice: Random, root: Path, to: Path) -> Case:
    model = bases.copy(root, dice.choice(("edge", "moe")), to)
    path = (model if dice.random() < 0.7 else to / "model-assistant") / "model.safetensors"
    if dice.random() < 0.4:
        damage(path, dice)
        return Case(model)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    act = dice.random()
    if act < 0.7:
        change(dice, header, dice.choice((1, 1, 2)))
    elif act < 0.8:
        name = dice.choice(list(header))
        header[name.replace("layers.0", "layers." + "7" * dice.choice((1, 2, 5000)))] = header.pop(name)
    else:
        first, second = dice.choice(list(header)), dice.choice(list(header))
        header[first], header[second] = header[second], header[first]
    text = json.dumps(header).encode()
    text += b" " * dice.choice((0, 0, 1, -len(text) % 8))
    body = bytearray(data[8 + length :])
    if dice.random() < 0.3:  # NaN, infinities and huge values among the weights
        for _ in range(20):
            at = dice.randrange(len(body) // 4) * 4
            body[at : at + 4] = dice.choice((b"\x00\x00\xc0\x7f", b"\x00\x00\x80\xff", b"\xff\xff\x7f\x7f"))
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return Case(model)


def index(dice: Random, root: Path, to: Path) -> Case:
    model = bases.copy(root, "sharded", to)
    path = model / "model.safetensors.index.json"
    act = dice.random()
    if act < 0.3:
        damage(path, dice)
    elif act < 0.5:
        os.unlink(dice.choice(sorted(model.glob("*.safetensors"))))
    else:
        tree = json.loads(path.read_bytes())
        shard = dice.choice(("../../etc/passwd", "/dev/zero", "a" * 300, "x\x00y", "..", "", 7, None, "config.json"))
        if dice.random() < 0.6:
            tree["weight_map"][dice.choice(list(tree["weight_map"]))] = shard
        else:
            change(dice, tree)
        path.write_text(json.dumps(tree))
    return Case(model)


def tokenizer(dice: Random, root: Path, to: Path) -> Case:
    model = bases.copy(root, dice.choice(("edge", "moe")), to)
    path = model / "tokenizer.json"
    if dice.random() < 0.2:
        damage(path, dice)
        return Case(model)
    tree = json.loads(path.read_bytes())
    act = dice.random()
    if act < 0.25:
        part = dice.choice(("normalizer", "pre_tokenizer", "post_processor", "decoder", "model"))
        tree[part] = copy.deepcopy(dice.choice(COMPONENTS))
    elif act < 0.45:
        token = dice.choice(list(tree["model"]["vocab"]))
        tree["model"]["vocab"][token] = dice.choice(NUMBERS)
    elif act < 0.6:
        dice.choice(tree["added_tokens"])[dice.choice(("id", "content", "special", "normalized"))] = wild(dice)
    elif act < 0.7:
        tree["model"]["merges"] = dice.choice(([], [["a", "b"]], ["a b"], [["a"]], tree["model"]["merges"] * 3, "x"))
    else:
        parts = [tree[p] for p in ("normalizer", "decoder", "pre_tokenizer", "model") if tree.get(p)]
        change(dice, dice.choice([tree, *parts]), dice.choice((1, 2)))
    path.write_text(json.dumps(tree))
    return Case(model)


COMPONENTS: list[Any] = [
    None,
    {},
    {"type": "Precompiled", "precompiled_charsmap": "////////AAAA"},
    {"type": "Precompiled", "precompiled_charsmap": "AAAAgA=="},
    {"type": "Replace", "pattern": {"String": ""}, "content": "x"},
    {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10000},
    {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""},
    {"type": "Replace", "pattern": {"Regex": "("}, "content": ""},
    {"type": "Prepend", "prepend": "x" * 10000},
    {"type": "Sequence", "normalizers": []},
    {"type": "Sequence", "decoders": []},
    {"type": "Sequence", "pretokenizers": []},
    {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False},
    {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False},
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
    {"type": "WordPiece", "prefix": "##", "cleanup": True},
    {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
    {"type": "Strip", "content": " ", "start": 2**40, "stop": 0},
    {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
    {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
    {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0]], "byte_fallback": False},
    {"type": "BPE", "vocab": {}, "merges": []},
    {"type": "NFKC"},
]


def template(dice: Random, root: Path, to: Path) -> Case:
    model = bases.copy(root, "edge", to)
    path = model / "chat_template.jinja"
    text = bases.TEMPLATE
    act = dice.random()
    if act < 0.1:
        damage(path, dice)
        return Case(model)
    if act < 0.25:
        text = dice.choice(list(BOMBS.values()))
    elif act < 0.5:
        for _ in range(dice.choice((1, 2, 5))):
            at = dice.randrange(len(text) + 1)
            cut = dice.choice((0, 0, 1, 5, 40))
            text = text[:at] + dice.choice(FRAGMENTS) + text[at + cut :]
    else:  # whole fragments between whole statements
        lines = text.splitlines()
        for _ in range(dice.choice((1, 2))):
            lines.insert(dice.randrange(len(lines) + 1), dice.choice(FRAGMENTS))
        text = "\n".join(lines)
    path.write_text(text)
    return Case(model)


def tokenizer_config(dice: Random, root: Path, to: Path) -> Case:
    model = bases.copy(root, "edge", to)
    path = model / "tokenizer_config.json"
    tree = {"bos_token": "<bos>", "eos_token": {"content": "<eos>"}, "add_bos_token": True}
    if dice.random() < 0.5:
        os.unlink(model / "chat_template.jinja")
        template = dice.choice((bases.TEMPLATE, dice.choice(list(BOMBS.values())), wild(dice)))
        tree["chat_template"] = dice.choice((template, [{"name": "default", "template": template}], [template]))
    change(dice, tree, dice.choice((1, 2)))
    path.write_text(json.dumps(tree))
    if dice.random() < 0.2:
        damage(path, dice)
    return Case(model)


def generation_config(dice: Random, root: Path, to: Path) -> Case:
    model = bases.copy(root, dice.choice(("edge", "moe")), to)
    path = model / "generation_config.json"
    names = ("eos_token_id", "temperature", "top_k", "top_p", "min_p", "do_sample", "suppress_tokens")
    tree = {
        **copy.deepcopy(bases.GENERATION),
        **{dice.choice((*names, "repetition_penalty", "bos_token_id")): wild(dice)},
    }
    if dice.random() < 0.3:
        tree["suppress_tokens"] = dice.choice(([*range(416)], [*range(415)], [-1], [10**9], [1.5], [True], 3))
    if dice.random() < 0.5:
        change(dice, tree)
    path.write_text(json.dumps(tree))
    if dice.random() < 0.1:
        damage(path, dice)
    return Case(model)


def converted(dice: Random, root: Path, to: Path) -> Case:
    model = bases.copy(root, dice.choice(("q8", "q4")), to)
    folder = model if dice.random() < 0.7 else model / "assistant"
    if dice.random() < 0.5:
        rewrite(folder / "config.json", dice, dice.choice((1, 1, 2)))
    if dice.random() < 0.6:
        pack_header(folder / "model.paceline", dice)
    return Case(model)


def pack_header(path: Path, dice: Random) -> None:
    """Change a pack file's header, and make its checks right again, as who means harm would."""
    data = path.read_bytes()
    length = int.from_bytes(data[12:16], "little")
    header = json.loads(data[20 : 20 + length])
    items = header["items"]
    act = dice.random()
    first, second = dice.choice(list(items)), dice.choice(list(items))
    if act < 0.3:
        change(dice, items[first])
    elif act < 0.5:
        items[first], items[second] = items[second], items[first]
    elif act < 0.7:
        key = dice.choice(("offset", "bytes", "shape", "format", "dtype", "kind"))
        value = dice.choice((1, 8, 63, -4096, 4096, 2**40, [1], [1, 1], [16, 2**60], "q4_0", "O", "<i4", "table"))
        items[first][key] = dice.choice((value, items[second].get(key)))
    elif act < 0.8:
        del items[first]
    elif act < 0.9:
        items[f"{first}.x"] = items[second]
    else:
        change(dice, header)
    text = json.dumps(header).encode()
    text += b" " * (length - len(text))  # the data stay where they are, as long as the header is not longer
    start = 20 + length + -(20 + length) % 4096
    padded = text + bytes(-(20 + len(text)) % 4096)
    head = data[:12] + len(text).to_bytes(4, "little") + zlib.crc32(text).to_bytes(4, "little")
    path.write_bytes(head + padded + data[start:])


def gguf(dice: Random, root: Path, to: Path) -> Case:
    model = bases.copy(root, "gguf", to)
    path = model / "model.gguf" if dice.random() < 0.75 else to / "model-assistant" / "mtp.gguf"
    path.write_bytes(mutated(dice, Raw.of(path.read_bytes()))[1])
    return Case(model)


def parts(dice: Random, root: Path, to: Path) -> Case:
    """A model in several GGUF files: parts that are missing, changed, swapped, or another's."""
    model = bases.copy(root, "parts", to)
    files = sorted(model.glob("*.gguf"))
    one, other = dice.choice(files), dice.choice(files)
    act = dice.randrange(5)
    if act == 0:
        one.unlink()
    elif act == 1:
        one.write_bytes(other.read_bytes())
    elif act == 2:
        one.rename(model / dice.choice(("x.gguf", "model-00009-of-00009.gguf", other.name)))
    elif act == 3:
        raw = Raw.of(one.read_bytes())
        key = dice.choice([key for key in raw.keys if key[0].startswith(b"split.")])
        key[2] = bytes(dice.choice((0, 1, 2, 3, 255)) for _ in key[2])
        one.write_bytes(raw.join())
    else:
        one.write_bytes(mutated(dice, Raw.of(one.read_bytes()))[1])
    return Case(model)


def packs(dice: Random, root: Path, to: Path) -> Case:
    """Damage to kept packs must not show: the checkpoint is packed again."""
    cache = to / "cache"
    bases.shutil.copytree(root / "cache", cache)
    for path in sorted(cache.glob("*.pack")):
        if dice.random() < 0.8:
            (pack_header if dice.random() < 0.5 else damage)(path, dice)
    return Case(root / "edge", {"quant": "q8"}, must_load=True, text_is_known=True, cache=cache)


MUTATORS: dict[str, tuple[int, Mutator]] = {  # with their share of the cases
    "unchanged": (2, unchanged),
    "safetensors": (15, safetensors),
    "config": (23, config),
    "rope": (6, rope),
    "sizes": (6, sizes),
    "tokenizer": (15, tokenizer),
    "template": (8, template),
    "tokenizer_config": (4, tokenizer_config),
    "generation_config": (6, generation_config),
    "index": (3, index),
    "packs": (3, packs),
    "converted": (13, converted),
    "gguf": (11, gguf),
    "parts": (3, parts),
}
