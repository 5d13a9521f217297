"""A model: a folder with its configs, tensors and text files, or a GGUF file, which holds all of that.

Opening it reads only JSON and headers. What follows sees no difference: a GGUF file is read into the same fields.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from paceline.checkpoint.config_json import DRAFTER_TYPES, TARGET_TYPES, drafter_config, target_config, token_ids
from paceline.checkpoint.foreign import foreign
from paceline.checkpoint.gguf import read_gguf
from paceline.checkpoint.gguf_model import read_model
from paceline.checkpoint.gguf_text import generation_settings, read_vocabulary, token_settings, tokenizer_settings
from paceline.checkpoint.names import with_head
from paceline.checkpoint.safetensors import read_header
from paceline.checkpoint.tensors import TensorRef
from paceline.config import DrafterConfig, TargetConfig
from paceline.errors import CheckpointError
from paceline.files import read_json
from paceline.sampling_params import PARAMETERS, SamplingParams
from paceline.vocabulary import Vocabulary

Config = TypeVar("Config")
PACKED_NAME = "model.paceline"  # packed weights, in a folder that `paceline convert` made


@dataclass(frozen=True)
class Checkpoint:
    """An opened model, target or drafter."""

    path: Path  # the folder, or the GGUF file
    config: Mapping[str, Any]  # config.json
    generation: Mapping[str, Any]  # generation_config.json, empty if there is none
    tokenizer_config: Mapping[str, Any]  # tokenizer_config.json, empty if there is none
    tensors: Mapping[str, TensorRef]  # by name in the files, or canonical; empty in a converted folder
    vocabulary: Vocabulary | None = None  # of a GGUF file

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Open a model folder, or a GGUF file whatever its name (`locate` finds the file in a folder of GGUFs).

        Raises:
            CheckpointError: the folder or a file is missing, damaged, or not of a Gemma model.
        """
        if path.is_file():
            return cls._open_gguf(path)
        if not path.is_dir():
            raise CheckpointError(f"{path}: no such folder; give a model folder, a GGUF or a hub id such as org/name")
        if not os.path.lexists(path / "config.json"):
            _refuse_foreign(path, None)
        config = read_json(path / "config.json")
        _refuse_foreign(path, config)
        kind = config.get("model_type")
        if kind not in TARGET_TYPES + DRAFTER_TYPES:
            raise CheckpointError(
                f"{path / 'config.json'}: not a Gemma model (model_type {kind!r}); "
                f"give a folder whose model_type is one of {', '.join(TARGET_TYPES + DRAFTER_TYPES)}"
            )
        optional = [path / name for name in ("generation_config.json", "tokenizer_config.json")]
        generation, tokenizer = (read_json(file) if os.path.lexists(file) else {} for file in optional)
        tensors = _read_tensors(path)
        _refuse_foreign(path, config, tensors)
        return cls(path, config, generation, tokenizer, tensors)

    @classmethod
    def _open_gguf(cls, path: Path) -> Checkpoint:
        file = read_gguf(path)
        config, tensors = read_model(file)
        vocabulary = read_vocabulary(file)
        config |= token_settings(file, vocabulary)
        settings = tokenizer_settings(file, vocabulary)
        return cls(path, config, generation_settings(file), settings, tensors, vocabulary)

    @property
    def packed(self) -> Path | None:
        """The packed weights of a converted folder."""
        path = self.path / PACKED_NAME
        return path if path.exists() else None

    @property
    def is_gguf(self) -> bool:
        return self.path.is_file()

    @property
    def cure(self) -> str:
        """What to do where the settings and the tensors do not agree, or one is missing."""
        return "take another file of this model" if self.is_gguf else "download it again, with its own config.json"

    @property
    def tokenizer(self) -> Path | Vocabulary:
        """What a tokenizer is made of: `tokenizer.json`, whether it is there or not, or a GGUF file's vocabulary.

        Raises:
            CheckpointError: the GGUF file has no vocabulary.
        """
        if self.vocabulary:
            return self.vocabulary
        if self.is_gguf:
            raise CheckpointError(f"{self.path}: has no tokenizer; take another file of this model")
        return self.path / "tokenizer.json"

    @property
    def has_tokenizer(self) -> bool:
        return self.vocabulary is not None or (self.path / "tokenizer.json").exists()

    @property
    def chat_template_path(self) -> Path | None:
        """Path of the template file; older checkpoints and GGUF files have the template in `tokenizer_config`."""
        path = self.path / "chat_template.jinja"
        return path if path.exists() else None

    @property
    def has_chat_template(self) -> bool:
        return self.chat_template_path is not None or "chat_template" in self.tokenizer_config

    def where(self, name: str) -> Path:
        """The file that holds what a model folder has under this name, for messages."""
        return self.path if self.is_gguf else self.path / name

    def sampling(self) -> SamplingParams:
        """The sampling parameters of `generation_config.json`; greedy without `do_sample`.

        Raises:
            CheckpointError: a setting is not a number.
        """
        path = self.where("generation_config.json")
        suppressed = token_ids(self.generation.get("suppress_tokens"), f"{path}: suppress_tokens")
        sampled = bool(self.generation.get("do_sample"))
        numbers: dict[str, Any] = {"temperature": 1.0} if sampled else {}
        for name, parameter in PARAMETERS.items():
            value = self.generation.get(name)
            if value is None or not parameter.checkpoint:
                continue
            if isinstance(value, bool) or not isinstance(value, int if parameter.kind is int else (int, float)):
                raise CheckpointError(f"{path}: {name} is {value!r}; it must be a number")
            if sampled or parameter.checkpoint == "always":
                numbers[name] = value
        return SamplingParams(**numbers, suppressed=suppressed)

    def target_config(self) -> TargetConfig:
        """The config of a target, with the head that its tensors hold.

        Raises:
            CheckpointError: this is a drafter, or a setting is missing or unsupported.
        """
        config = self._resolve(target_config)
        return config if self.packed else with_head(config, self.tensors)

    def drafter_config(self) -> DrafterConfig:
        """The config of a drafter.

        Raises:
            CheckpointError: this is a target, or a setting is missing or unsupported.
        """
        return self._resolve(drafter_config)

    def _resolve(self, read: Callable[[Mapping[str, Any]], Config]) -> Config:
        path = self.where("config.json")
        try:
            return read(self.config)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error


def _refuse_foreign(folder: Path, config: Mapping[str, Any] | None, names: Iterable[str] = ()) -> None:
    """Raise `CheckpointError` with what a folder is if it is known but none to read."""
    if not (folder / PACKED_NAME).exists() and (what := foreign(folder, config, names)):
        raise CheckpointError(f"{folder}: {what}")


def shard_names(folder: Path) -> tuple[str, ...]:
    """The weight files of a folder: one, or those in its index.

    Raises:
        CheckpointError: there is neither `model.safetensors` nor a readable index.
    """
    if (folder / "model.safetensors").exists():
        return ("model.safetensors",)
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        raise CheckpointError(f"{folder}: has no model.safetensors and no model.safetensors.index.json; download them")
    return tuple(sorted(set(_weight_map(index).values())))


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    # names only: an index must not point outside its folder
    if not isinstance(weight_map, dict) or not all(
        isinstance(shard, str) and Path(shard).name == shard != ".." for shard in weight_map.values()
    ):
        raise CheckpointError(f"{index}: has no valid weight_map; download it again")
    return weight_map


def _read_tensors(folder: Path) -> dict[str, TensorRef]:
    tensors: dict[str, TensorRef] = {}
    if (folder / PACKED_NAME).exists():
        return tensors
    shards = shard_names(folder)
    for shard in shards:
        path = folder / shard
        if not os.path.isfile(path):
            raise CheckpointError(f"{path}: this shard is missing; download it")
        for name, ref in read_header(path).items():
            if name in tensors:
                raise CheckpointError(f"{path}: the tensor {name} is also in {tensors[name].path.name}; download both")
            tensors[name] = ref
    if shards != ("model.safetensors",):
        for name, shard in _weight_map(folder / "model.safetensors.index.json").items():
            if name not in tensors or tensors[name].path.name != shard:
                raise CheckpointError(f"{folder / shard}: lacks the tensor {name} that the index lists; download it")
    return tensors
