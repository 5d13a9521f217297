"""A model folder: its configs, tensors and text files. Opening it reads only JSON and headers."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from paceline.checkpoint.config_json import DRAFTER_TYPES, TARGET_TYPES, drafter_config, target_config, token_ids
from paceline.checkpoint.names import with_head
from paceline.checkpoint.safetensors import TensorRef, read_header
from paceline.config import DrafterConfig, TargetConfig
from paceline.errors import CheckpointError
from paceline.files import read_json
from paceline.sampling_params import PARAMETERS, SamplingParams

Config = TypeVar("Config")
PACKED_NAME = "model.paceline"  # packed weights, in a folder that `paceline convert` made


@dataclass(frozen=True)
class Checkpoint:
    """An opened model folder, target or drafter."""

    folder: Path
    config: Mapping[str, Any]  # config.json
    generation: Mapping[str, Any]  # generation_config.json, empty if there is none
    tokenizer_config: Mapping[str, Any]  # tokenizer_config.json, empty if there is none
    tensors: Mapping[str, TensorRef]  # by name in the files; empty in a converted folder

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Open a model folder.

        Raises:
            CheckpointError: the folder or a file is missing, damaged, or not of a Gemma 4 model.
        """
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder; give a model folder or a hub id such as org/name")
        config = read_json(folder / "config.json")
        kind = config.get("model_type")
        if kind not in TARGET_TYPES + DRAFTER_TYPES:
            raise CheckpointError(
                f"{folder / 'config.json'}: not a Gemma 4 model (model_type {kind!r}); "
                f"give a folder whose model_type is one of {', '.join(TARGET_TYPES + DRAFTER_TYPES)}"
            )
        optional = [folder / name for name in ("generation_config.json", "tokenizer_config.json")]
        generation, tokenizer = (read_json(path) if os.path.lexists(path) else {} for path in optional)
        return cls(folder, config, generation, tokenizer, _read_tensors(folder))

    @property
    def packed(self) -> Path | None:
        """The packed weights of a converted folder."""
        path = self.folder / PACKED_NAME
        return path if path.exists() else None

    @property
    def tokenizer_path(self) -> Path:
        return self.folder / "tokenizer.json"

    @property
    def chat_template_path(self) -> Path:
        """Path of the template file; older checkpoints have the template in `tokenizer_config` instead."""
        return self.folder / "chat_template.jinja"

    def sampling(self) -> SamplingParams:
        """The sampling parameters of `generation_config.json`; greedy without `do_sample`.

        Raises:
            CheckpointError: a setting is not a number.
        """
        path = self.folder / "generation_config.json"
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
        if self.packed:
            return self._resolve(target_config)
        return self._resolve(lambda config: with_head(target_config(config), self.tensors))

    def drafter_config(self) -> DrafterConfig:
        """The config of a drafter.

        Raises:
            CheckpointError: this is a target, or a setting is missing or unsupported.
        """
        return self._resolve(drafter_config)

    def _resolve(self, read: Callable[[Mapping[str, Any]], Config]) -> Config:
        path = self.folder / "config.json"
        try:
            return read(self.config)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error


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
