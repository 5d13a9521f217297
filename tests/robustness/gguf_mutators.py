"""Mutations of GGUF files: of every count, length, offset, type and string of the header, and of what they mean.

Each is a pure function of its random generator and of the bytes of a good file.
"""

from __future__ import annotations

import copy
import struct
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

STRING, ARRAY, U32 = 8, 9, 4
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
HUGE = (0, 1, 2, 7, 8, 31, 33, 255, 2**16, 2**20, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40)
HUGE += (2**59, 2**60, 2**61, 2**61 + 1, 2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 9, 2**64 - 8, 2**64 - 1)
TEXTS = (
    b"",
    b"\0",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"x" * 5000,
    b"<0x-1>",
    b"<0x100>",
    b"<eos>",
    b" ",
    b"\n",
    "▁".encode() * 40,
)


@dataclass
class Raw:
    """A file taken apart. A key is [name, type, value]; the value of a list is [type, items]; a tensor is
    [name, dimensions, type, offset]. What is not a string stays bytes."""

    keys: list[list[Any]]
    infos: list[list[Any]]
    data: bytes

    @classmethod
    def of(cls, data: bytes) -> Raw:
        at = 24

        def take(count: int) -> bytes:
            nonlocal at
            at += count
            return data[at - count : at]

        def number(count: int = 8) -> int:
            return int.from_bytes(take(count), "little")

        tensors, keys = struct.unpack("<qq", data[8:24])
        found, infos = [], []
        for _ in range(keys):
            name, kind = take(number()), number(4)
            if kind == ARRAY:
                items, count = number(4), number()
                strings = items == STRING
                value: Any = [items, [take(number()) for _ in range(count)] if strings else take(count * SIZES[items])]
            else:
                value = take(number()) if kind == STRING else take(SIZES[kind])
            found.append([name, kind, value])
        for _ in range(tensors):
            name = take(number())
            dimensions = [number() for _ in range(number(4))]
            infos.append([name, dimensions, number(4), number()])
        return cls(found, infos, data[at + -at % 32 :])

    def key(self, name: bytes) -> list[Any] | None:
        return next((key for key in self.keys if key[0] == name), None)

    def fields(self) -> list[bytes]:
        """The header in pieces, one for each number and each string."""
        found = [b"GGUF", u32(3), u64(len(self.infos)), u64(len(self.keys))]
        for name, kind, value in self.keys:
            found += [u64(len(name)), name, u32(kind)]
            if kind == ARRAY and isinstance(value, list):
                found += nested(value)
            elif kind == STRING:
                found += [u64(len(value)), value]
            else:
                found.append(value)
        for name, dimensions, kind, offset in self.infos:
            found += [u64(len(name)), name, u32(len(dimensions)), *map(u64, dimensions), u32(kind), u64(offset)]
        return found

    def join(self, fields: list[bytes] | None = None) -> bytes:
        header = b"".join(self.fields() if fields is None else fields)
        return header + bytes(-len(header) % 32) + self.data


def u32(value: int) -> bytes:
    return struct.pack("<I", value & 0xFFFFFFFF)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value & (2**64 - 1))


def nested(value: list[Any]) -> list[bytes]:
    """A list of numbers, strings, or lists."""
    items, content = value
    if isinstance(content, bytes):
        return [u32(items), u64(len(content) // SIZES.get(items, 1)), content]
    found = [u32(items), u64(len(content))]
    for one in content:
        found += nested(one) if isinstance(one, list) else [u64(len(one)), one]
    return found


Change = Callable[[Random, Raw], bytes | None]  # None: what the file has become


def fields(dice: Random, raw: Raw) -> bytes:
    """Counts, lengths, types, offsets: any number of the header becomes another."""
    found = raw.fields()
    for _ in range(dice.choice((1, 1, 1, 2, 5))):
        at = dice.randrange(len(found))
        piece = found[at]
        if len(piece) not in (1, 2, 4, 8):
            continue
        value = int.from_bytes(piece, "little")
        near = (value + 1, value - 1, value * 2, -value, value ^ (1 << dice.randrange(8 * len(piece))))
        value = dice.choice((dice.choice(HUGE), dice.choice(near)))
        found[at] = (value & ((1 << 8 * len(piece)) - 1)).to_bytes(len(piece), "little")
    return raw.join(found)


def strings(dice: Random, raw: Raw) -> None:
    for _ in range(dice.choice((1, 2))):
        act = dice.randrange(3)
        text = dice.choice(TEXTS)
        if act == 0:
            dice.choice(raw.keys)[0] = dice.choice((text, dice.choice(raw.keys)[0]))
        elif act == 1:
            dice.choice(raw.infos)[0] = dice.choice((text, dice.choice(raw.infos)[0]))
        else:
            named = [key for key in raw.keys if key[1] == STRING]
            if not named:  # later parts of a model have none
                continue
            key = dice.choice(named)
            key[2] = dice.choice(
                (text, b"clip", b"llama", b"gemma4-assistant", b"gemma3", b"gemma4", b"linear", key[2] * 2)
            )


def settings(dice: Random, raw: Raw) -> None:
    """Values of settings: wild, of another type, lists for numbers, missing, twice."""
    for _ in range(dice.choice((1, 1, 2))):
        key = dice.choice(raw.keys)
        act = dice.randrange(8)
        if act == 0:
            raw.keys.remove(key)
        elif act == 1:
            raw.keys.append(copy.deepcopy(key))
        elif act == 2:
            key[1], key[2] = dice.choice(raw.keys)[1:]
        elif act == 3:
            key[1], key[2] = ARRAY, [5, b"".join(u32(dice.choice(HUGE)) for _ in range(dice.choice((0, 1, 2, 5, 6))))]
        elif act == 4 and key[1] == ARRAY:
            content = key[2][1]
            size = SIZES.get(key[2][0], 1)
            key[2][1] = dice.choice((content[:-size], content + content[-size:], content[:0], content[::-1]))
        elif key[1] in SIZES:
            size = SIZES[key[1]]
            whole = dice.choice((dice.choice(HUGE), int.from_bytes(key[2], "little") + dice.choice((-1, 1, 8))))
            key[2] = (whole & ((1 << 8 * size) - 1)).to_bytes(size, "little")
            if key[1] == 6 and dice.random() < 0.5:
                key[2] = struct.pack("<f", dice.choice((0.0, -1.0, 1e-45, 1e38, float("nan"), float("inf"), 0.5)))
        else:
            raw.keys.append([dice.choice(NEW), *dice.choice(raw.keys)[1:]])


NEW = (
    *(b"general.alignment", b"split.count", b"split.no", b"split.tensors.count", b"gemma4.expert_count"),
    *(b"gemma4.rope.scaling.type", b"gemma4.rope.scaling.factor", b"gemma4.assistant.type", b"tokenizer.chat_template"),
    *(b"general.sampling.temp", b"general.sampling.top_k", b"tokenizer.ggml.eos_token_ids"),
    *(b"tokenizer.ggml.suppress_tokens", b"tokenizer.ggml.eot_token_id"),
)


def nesting(dice: Random, raw: Raw) -> None:
    """Lists of lists of lists."""
    depth = dice.choice((1, 2, 100, 3000))
    content = (u32(ARRAY) + u64(1)) * depth + u32(0) + u64(1) + b"\0"
    raw.keys.insert(dice.randrange(len(raw.keys)), [b"nested", ARRAY, content])


def alignment(dice: Random, raw: Raw) -> None:
    value = dice.choice((0, 1, 2, 3, 16, 31, 33, 64, 4096, 2**16, 2**20, 2**21, 2**31, 2**32 - 1))
    kind = dice.choice((U32, U32, U32, 10, 5, 0, 7, STRING))
    size = SIZES.get(kind, 0)
    content = b"32" if kind == STRING else (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")
    raw.keys.insert(0, [b"general.alignment", kind, content])


NAMES = (b"blk.4096.attn_q.weight", b"blk.-1.attn_q.weight", b"blk.0.attn_qkv.weight", b"output.weight")
NAMES += (b"rope_freqs.weight", b"v.x", b"mm.0")


def tensors(dice: Random, raw: Raw) -> None:
    for _ in range(dice.choice((1, 1, 2))):
        info = dice.choice(raw.infos)
        other = dice.choice(raw.infos)
        act = dice.randrange(9)
        if act == 0:
            info[2] = dice.choice((*range(45), 2**31, 2**32 - 1))
        elif act == 1:
            info[3] = dice.choice((*HUGE, info[3] + 32, info[3] - 32, other[3], len(raw.data), len(raw.data) & ~31))
        elif act == 2 and info[1]:
            info[1][dice.randrange(len(info[1]))] = dice.choice(HUGE)
        elif act == 3:
            info[1] = dice.choice(
                ([], [1], info[1][::-1], info[1] + [1], info[1] + [1] * 4, [2**31, 2**31, 4], [2**62] * 4)
            )
        elif act == 4:
            raw.infos.remove(info)
        elif act == 5:
            raw.infos.append(copy.deepcopy(info))
        elif act == 6:
            info[0], other[0] = other[0], info[0]
        elif act == 7:
            info[0] = dice.choice(NAMES)
        else:
            info[1], info[2], info[3] = copy.deepcopy(other[1:])


def tokenizer(dice: Random, raw: Raw) -> None:
    """Tokens, their types and scores, and merges."""
    name = dice.choice(
        (b"tokens", b"tokens", b"token_type", b"scores", b"merges", b"merges", b"model", b"bos_token_id")
    )
    key = raw.key(b"tokenizer.ggml." + name)
    if key is None:
        return
    if key[1] == STRING:
        key[2] = dice.choice((b"llama", b"gpt2", b"bert", b"", b"gemma4"))
    elif key[1] != ARRAY:
        key[2] = dice.choice((u32(2**32 - 1), u32(416), u32(10**6), u32(0)))
    elif dice.random() < 0.15:
        raw.keys.remove(key)
    elif isinstance(key[2][1], bytes):
        content = bytearray(key[2][1])
        for _ in range(dice.choice((1, 1, 50))):
            at = dice.randrange(len(content) // 4) * 4
            content[at : at + 4] = dice.choice((u32(dice.randrange(8)), u32(2**31), struct.pack("<f", float("nan"))))
        key[2][1] = bytes(content)
    else:
        items = key[2][1]
        for _ in range(dice.choice((1, 1, 3))):
            at = dice.randrange(len(items))
            act = dice.randrange(5)
            if act == 0:
                items[at] = dice.choice((*TEXTS, b"a b c", b"a ", b" a", b"never seen"))
            elif act == 1:
                items[at] = dice.choice(items)
            elif act == 2:
                del items[at]
            elif act == 3:
                items.insert(at, dice.choice((*TEXTS, dice.choice(items))))
            else:
                items[at], items[0] = items[0], items[at]


def truncation(dice: Random, raw: Raw) -> bytes:
    data = raw.join()
    header = len(data) - len(raw.data)
    return data[: dice.choice((dice.randrange(len(data)), dice.randrange(header), dice.randrange(64), len(data) - 1))]


def flips(dice: Random, raw: Raw) -> bytes:
    data = bytearray(raw.join())
    header = len(data) - len(raw.data)
    for _ in range(dice.choice((1, 1, 2, 8))):
        at = dice.randrange(dice.choice((32, header, len(data))))
        if dice.random() < 0.7:
            data[at] ^= 1 << dice.randrange(8)
        else:
            data[at : at + 8] = u64(dice.choice(HUGE))
    return bytes(data)


CHANGES: dict[str, tuple[int, Change]] = {  # with their share
    "fields": (4, fields),
    "settings": (4, settings),
    "tensors": (4, tensors),
    "tokenizer": (4, tokenizer),
    "strings": (2, strings),
    "flips": (2, flips),
    "truncation": (1, truncation),
    "alignment": (1, alignment),
    "nesting": (1, nesting),
}


def mutated(dice: Random, raw: Raw) -> tuple[str, bytes]:
    """A changed file, and the kind of change."""
    raw = copy.deepcopy(raw)
    [name] = dice.choices(list(CHANGES), [share for share, _ in CHANGES.values()])
    found = CHANGES[name][1](dice, raw)
    return name, raw.join() if found is None else found
