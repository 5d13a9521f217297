"""Which GGUF file of several: the names that quantisers give their files, and what they say.

A repository or folder holds one model in several block formats, vision towers (`mmproj-*`), drafters (`mtp-*`,
`*-assistant*`), and files in shards (`*-00001-of-00003.gguf`). Names only suggest; readers check the files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from paceline.errors import CheckpointError
from paceline.memory import AUTO_SHARE, available_memory

SUFFIX = ".gguf"
SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)
# as in gemma-4-E2B_q4_0-it, UD-Q4_K_XL, IQ4_XS, MXFP4_MOE; the "it" of E2B_q4_0_it is no part of it
TAG = re.compile(
    r"(?<![a-z0-9])(?:ud-)?(?:i?q\d+(?:_(?!it(?![a-z0-9]))(?:\d+|[a-z]{1,3}))+|tq\d_\d|bf16|fp?16|fp?32|mxfp4(?:_moe)?|nvfp4)"
    r"(?![a-z0-9])",
    re.IGNORECASE,
)
UNREADABLE_TAG = re.compile(r"(?:ud-)?(?:i?q1_|iq[23]_|tq|q2_0|nvfp4)", re.IGNORECASE)  # formats without a kernel
DRAFTER = re.compile(r"(?<![a-z0-9])(?:mtp|assistant)(?![a-z0-9])", re.IGNORECASE)
# vision and audio towers, other drafters than MTP, and what quantisers calibrated with
NO_MODEL = re.compile(r"(?<![a-z0-9])(?:mmproj|clip|imatrix|eagle3|dflash|dspark)(?![a-z0-9])", re.IGNORECASE)
MODEL_SIZE = re.compile(r"(?<![a-z0-9])(?:e\d+b|\d+b|\d+m)(?![a-z0-9])", re.IGNORECASE)  # E2B, 12B, 270m
MOST_NAMED = 8  # files that a message lists


@dataclass(frozen=True)
class GgufFile:
    """A GGUF, whole or in shards."""

    names: tuple[str, ...]  # its shards in order, or itself; within the listing, with "/" between folders
    size: int  # bytes, of all shards

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def whole(self) -> bool:
        """Whether no shard is missing in the listing."""
        shard = SHARD.fullmatch(self.name)
        return not shard or len(self.names) == int(shard.group(3))

    @property
    def tag(self) -> str:
        """Its block format as the name has it, upper case; "" if it has none."""
        found = TAG.findall(self.name)
        return str(found[-1]).upper() if found else ""

    @property
    def bits(self) -> int:
        """Bits a weight, roughly; 0 if the name has no format."""
        number = re.search(r"\d+", self.tag)
        return int(number.group()) if number else 0

    @property
    def is_drafter(self) -> bool:
        return bool(DRAFTER.search(self.name)) and not NO_MODEL.search(self.name)

    @property
    def is_target(self) -> bool:
        return not DRAFTER.search(self.name) and not NO_MODEL.search(self.name)

    def has_tag(self, tag: str) -> bool:
        """Whether this format stands in the name as a word: Q4_K is not part of Q4_K_M, nor F16 of BF16."""
        return bool(re.search(rf"(?<![a-z0-9]){re.escape(tag)}(?![a-z0-9_])", self._stem, re.IGNORECASE)) or (
            self.tag == tag.upper()
        )

    @property
    def model(self) -> str:
        """What the name says of the model: without folder, format, shard and the words for drafters."""
        words = re.split(r"[^a-z0-9]+", TAG.sub("", self._stem.rpartition("/")[2]).lower())
        return "-".join(word for word in words if word not in ("", "mtp", "assistant", "gguf", "ud", "i1"))

    @property
    def model_size(self) -> str:
        found = MODEL_SIZE.search(self.name.rpartition("/")[2])
        return found.group().lower() if found else ""

    @property
    def _stem(self) -> str:
        shard = SHARD.fullmatch(self.name)
        return shard.group(1) if shard else self.name[: -len(SUFFIX)]


def gguf_files(sizes: Mapping[str, int]) -> list[GgufFile]:
    """The GGUFs of a listing of names and bytes; shards of one model are one file."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in sorted(sizes):
        if name.lower().endswith(SUFFIX):
            shard = SHARD.fullmatch(name)
            groups.setdefault((shard.group(1), shard.group(3)) if shard else (name, ""), []).append(name)
    return [GgufFile(tuple(names), sum(sizes[name] for name in names)) for names in groups.values()]


@dataclass(frozen=True)
class Wanted:
    """What is looked for among GGUFs: a target, or the drafter of one."""

    notify: Callable[[str], None]  # told which of several files was chosen, and where it was found
    target: str | None = None  # the name of the target whose drafter is wanted

    def choose(self, sizes: Mapping[str, int], where: str, tag: str = "") -> GgufFile | None:
        """The file to load of those in a folder or repository, or None.

        Args:
            sizes: bytes of each file by name.
            where: the name of the folder or repository.
            tag: a format that the file's name must have, such as Q4_K_M; "" for any.

        Raises:
            CheckpointError: the files are of several models.
        """
        if tag:
            sizes = {name: sizes[name] for file in gguf_files(sizes) if file.has_tag(tag) for name in file.names}
        if self.target is None:
            return choose_target(sizes, where, self.notify)
        return choose_drafter(sizes, self.target, all_drafters=bool(DRAFTER.search(where)))

    def none(self, sizes: Mapping[str, int], where: str, tag: str = "") -> CheckpointError:
        """The error of a listing that has GGUFs, but none to choose."""
        files = gguf_files(sizes)
        fitting = [file for file in files if (file.is_target if self.target is None else file.is_drafter)]
        if fitting and tag:
            formats = _listed(file.tag or file.name for file in fitting)
            return CheckpointError(f"{where}: has no {tag} file; there is {formats}")
        if self.target is not None:
            return CheckpointError(f"{where}: has no drafter of {self.target}, by the names; give the drafter's file")
        if any(file.is_drafter for file in files):
            return CheckpointError(f"{where}: holds drafters only; give the target as the model and this as --drafter")
        return CheckpointError(
            f"{where}: holds only parts for images or other kinds of drafts ({_listed(file.name for file in files)}); "
            "give the model itself"
        )


def choose_target(sizes: Mapping[str, int], where: str, notify: Callable[[str], None]) -> GgufFile | None:
    """The target among files, or None: of several formats the largest that fits the memory at hand.

    Raises:
        CheckpointError: the files are of several models.
    """
    targets = [file for file in gguf_files(sizes) if file.is_target]
    if len({file.model for file in targets}) > 1:
        raise CheckpointError(f"{where}: holds several models; give one of {_listed(file.name for file in targets)}")
    readable = [file for file in targets if not UNREADABLE_TAG.match(file.tag)] or targets
    if len(readable) < 2:
        return readable[0] if readable else None
    # bf16 is what Gemma was published in: f32 holds no more, and f16 less
    readable.sort(key=lambda file: (file.tag not in ("F32", "FP32"), file.size, file.tag == "BF16"))
    memory = available_memory()
    fitting = [file for file in readable if file.size <= AUTO_SHARE * memory]
    best = fitting[-1] if fitting else min(readable, key=lambda file: file.size)
    why = "the best that fits" if fitting else "the smallest, though it may not fit"
    notify(
        f"model: {best.name} ({best.size / 1e9:.2f} GB), {why} the memory at hand ({memory / 1e9:.1f} GB) "
        f"of {len(readable)} files in {where}"
    )
    return best


def choose_drafter(sizes: Mapping[str, int], target: str, *, all_drafters: bool = False) -> GgufFile | None:
    """The drafter of a target among files, or None.

    Those whose name says another size of model are left out. Of the rest: one of the same training (QAT or not), of the
    same name, with the most folders in common, of the same format, not in a folder of its own, of the nearest bits.

    Args:
        sizes: bytes of each file by name.
        target: the name of the target's file in the same listing, or of its folder.
        all_drafters: the listing is of drafters, whatever the names of its files.
    """
    of = GgufFile((target if target.lower().endswith(SUFFIX) else target + SUFFIX,), 0)
    files = gguf_files(sizes)
    found = [file for file in files if file.is_drafter or (all_drafters and file.is_target)]
    found = [file for file in found if not (file.model_size and of.model_size and file.model_size != of.model_size)]

    def distance(file: GgufFile) -> tuple[object, ...]:
        return (
            ("qat" in file.model.split("-")) != ("qat" in of.model.split("-")),
            file.model != of.model,
            -_shared_folders(file.name, target),
            file.tag != of.tag,
            file.name.count("/"),
            abs(file.bits - of.bits),
            file.name,
        )

    return min(found, key=distance, default=None)


def _shared_folders(name: str, other: str) -> int:
    pairs = list(zip(PurePosixPath(name).parts[:-1], PurePosixPath(other).parts[:-1], strict=False))
    return next((depth for depth, (one, two) in enumerate(pairs) if one != two), len(pairs))


def _listed(names: Iterable[str]) -> str:
    unique = list(dict.fromkeys(names))
    more = f" and {len(unique) - MOST_NAMED} more" if len(unique) > MOST_NAMED else ""
    return ", ".join(unique[:MOST_NAMED]) + more
