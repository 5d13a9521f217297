"""`paceline inspect`: shape and memory needs of a checkpoint, from its headers."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paceline.cli import options as opt

if TYPE_CHECKING:
    from rich.console import Console

    from paceline.checkpoint import Checkpoint, Tensors
    from paceline.config import TargetConfig

CONTEXT = 4096  # positions for which the size of the KV cache is shown


def inspect(
    model: Annotated[str, typer.Argument(help=opt.MODEL_HELP, metavar="MODEL")],
    drafter: opt.DrafterOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show a model's shape, memory needs and drafter.

    Only headers are read. A hub id that is not in the cache is downloaded
    first.

    \b
    Examples:
      paceline inspect tiny-python
      paceline inspect google/gemma-4-E2B-it
      paceline inspect ./gemma-4-26B-A4B-it --drafter ./drafter --json
    """
    found = report(model, drafter)
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
        return
    from rich.console import Console

    _print(Console(highlight=False), found)


def report(model: str, drafter: str) -> dict[str, Any]:
    """Everything that `inspect` shows; sizes in bytes.

    Raises:
        CheckpointError: the model or its drafter cannot be loaded.
    """
    from paceline.checkpoint import Checkpoint, Tensors, locate, locate_drafter, resolve
    from paceline.checkpoint.sizes import count_parameters

    folder = locate(model, opt.note)
    checkpoint = Checkpoint.open(folder)
    config = checkpoint.target_config()
    tensors = Tensors({}, {}) if checkpoint.packed else resolve(checkpoint, config)
    drafter_folder = locate_drafter(model, folder, drafter, opt.note)
    return {
        "model": model,
        "folder": str(folder),
        "shape": _shape(config),
        "parameters": asdict(count_parameters(config)),
        "stored_as": dict(Counter(ref.dtype for ref in tensors.refs.values()).most_common()),
        "calibrated_tokens": checkpoint.config.get("calibrated_tokens") if checkpoint.packed else None,
        "files": _file_sizes(checkpoint),
        **_memory(config, tensors),
        "cache": _cache(config),
        "tokenizer": checkpoint.has_tokenizer,
        "chat_template": checkpoint.has_chat_template,
        "skipped": _skipped(checkpoint, tensors),
        "drafter": _drafter(config, drafter_folder) if drafter_folder else None,
    }


def _shape(config: TargetConfig) -> dict[str, Any]:
    def of_kind(sliding: bool) -> dict[str, int] | None:
        layers = [layer for layer in config.layers if layer.sliding == sliding]
        if not layers:
            return None
        return {"layers": len(layers), "head_dim": layers[0].head_dim, "kv_heads": layers[0].kv_heads}

    experts = config.experts
    return {
        "model_type": config.model_type,
        "layers": len(config.layers),
        "sliding": of_kind(sliding=True),
        "full": of_kind(sliding=False),
        "kv_shared_layers": len(config.layers) - config.first_shared_layer,
        "hidden_size": config.hidden_size,
        "intermediate_sizes": sorted({layer.intermediate_size for layer in config.layers}),
        "heads": config.heads,
        "sliding_window": config.sliding_window,
        "max_positions": config.max_positions,
        "vocab_size": config.vocab_size,
        "per_layer_embedding": config.ple_size,
        "experts": {"count": experts.count, "active": experts.active, "width": experts.intermediate_size}
        if experts
        else None,
    }


def _memory(config: TargetConfig, tensors: Tensors) -> dict[str, dict[str, float]]:
    from paceline.checkpoint.sizes import bits_per_weight, weight_bytes
    from paceline.quant.recipes import RECIPES

    quants = [quant for quant in RECIPES if tensors.refs or quant != "file"]
    return {
        "memory": {quant: weight_bytes(config, quant, tensors.elements) for quant in quants},
        "bits_per_weight": {quant: bits_per_weight(config, quant, tensors.elements) for quant in quants},
    }


def _cache(config: TargetConfig) -> dict[str, int]:
    from paceline.checkpoint.sizes import cache_bytes

    window = config.sliding_window
    return {
        "bytes_per_token": cache_bytes(config, 1),
        "bytes_per_token_beyond_window": cache_bytes(config, window + 1) - cache_bytes(config, window),
        "positions": CONTEXT,
        "bytes": cache_bytes(config, CONTEXT),
        "bytes_q8": cache_bytes(config, CONTEXT, "q8"),
    }


def _file_sizes(checkpoint: Checkpoint) -> dict[str, int]:
    paths = {ref.path for ref in checkpoint.tensors.values()} | ({checkpoint.packed} if checkpoint.packed else set())
    return {path.name: path.stat().st_size for path in sorted(paths)}


def _skipped(checkpoint: Checkpoint, tensors: Tensors) -> dict[str, dict[str, Any]]:
    groups: dict[str, dict[str, Any]] = {}
    for name, reason in tensors.skipped.items():
        group = groups.setdefault(reason, {"tensors": 0, "bytes": 0, "first": name})
        group["tensors"] += 1
        group["bytes"] += checkpoint.tensors[name].bytes
    return groups


def _drafter(target: TargetConfig, folder: Path) -> dict[str, Any]:
    from paceline.backends.formats import drafter_quant
    from paceline.checkpoint import Checkpoint, Tensors, resolve
    from paceline.checkpoint.sizes import count_parameters, weight_bytes
    from paceline.config import check_pair
    from paceline.errors import PairError
    from paceline.quant.recipes import RECIPES

    checkpoint = Checkpoint.open(folder)
    config = checkpoint.drafter_config()
    tensors = Tensors({}, {}) if checkpoint.packed else resolve(checkpoint, config)
    try:
        check_pair(target, config)
        misfit = None
    except PairError as error:
        misfit = str(error)
    return {
        "folder": str(folder),
        "fits": misfit is None,
        "misfit": misfit,
        "layers": len(config.layers),
        "hidden_size": config.hidden_size,
        "centroids": config.centroids,
        "head_tokens": config.draft_vocab_size,
        "parameters": count_parameters(config).total,
        "files": _file_sizes(checkpoint),
        "memory": {
            quant: weight_bytes(config, drafter_quant(checkpoint, quant), tensors.elements) for quant in RECIPES
        },
    }


# -- formatting --------------------------------------------------------------------------------------------------------


def _print(console: Console, found: dict[str, Any]) -> None:
    from rich.text import Text

    lines = _lines(found)
    width = max(len(title) for title, _ in lines) + 2
    for title, line in lines:
        console.print(Text.assemble((title.ljust(width), "bold"), line), soft_wrap=True)


def _lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    shape, parameters, cache = found["shape"], found["parameters"], found["cache"]
    lines = [("model", f"{found['folder']} ({shape['model_type']})")]
    lines.append(("layers", _layer_line(shape)))
    wide = " and ".join(str(size) for size in shape["intermediate_sizes"])
    lines.append(("width", f"hidden {shape['hidden_size']}, MLP {wide}, {shape['heads']} heads"))
    for kind in ("sliding", "full"):
        if part := shape[kind]:
            window = f", window {shape['sliding_window']}" if kind == "sliding" else ""
            lines.append((f"{kind} layers", f"{part['kv_heads']} K/V heads of {part['head_dim']}{window}"))
    if shape["per_layer_embedding"]:
        lines.append(("per-layer embedding", f"{shape['per_layer_embedding']} per layer, read from the file by row"))
    if experts := shape["experts"]:
        lines.append(("experts", f"{experts['count']}, {experts['active']} per token, width {experts['width']}"))
    lines.append(("vocabulary", f"{shape['vocab_size']} tokens; at most {shape['max_positions']} positions"))
    lines.append(("parameters", _parameter_line(parameters)))
    stored = ", ".join(f"{count} tensors {dtype}" for dtype, count in found["stored_as"].items()) or "packed weights"
    if found["calibrated_tokens"]:
        stored += f", calibrated on {found['calibrated_tokens']} tokens"
    lines.append(("stored as", stored))
    lines += [("file", f"{name}, {_size(size)}") for name, size in found["files"].items()]
    lines += [(f"memory in {quant}", line) for quant, line in _memory_lines(found)]
    lines.append(("KV cache (bf16)", _cache_line(cache)))
    if not found["tokenizer"]:
        lines.append(("tokenizer", "none: tokenizer.json is missing, so text cannot be generated"))
    lines.append(("chat template", "yes" if found["chat_template"] else "none: generate with --raw"))
    for reason, group in found["skipped"].items():
        line = f"{reason}: {group['tensors']} tensors, {_size(group['bytes'])} ({group['first']}, ...)"
        lines.append(("skipped", line))
    return lines + _drafter_lines(found["drafter"])


def _layer_line(shape: dict[str, Any]) -> str:
    kinds = [f"{shape[kind]['layers']} {kind}" for kind in ("sliding", "full") if shape[kind]]
    shared = f"; the last {shape['kv_shared_layers']} share K/V" if shape["kv_shared_layers"] else ""
    return f"{shape['layers']}: {' + '.join(kinds)}{shared}"


def _parameter_line(parameters: dict[str, int]) -> str:
    line = _count(parameters["total"])
    if parameters["effective"] != parameters["total"]:
        line += f", {_count(parameters['effective'])} without the per-layer-embedding table"
    if parameters["active"] != parameters["effective"]:
        line += f", {_count(parameters['active'])} active per token"
    return line


def _memory_lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    drafter = found["drafter"]["memory"] if found["drafter"] and found["drafter"]["fits"] else None
    lines = []
    for quant, size in found["memory"].items():
        with_drafter = f" + {_size(drafter[quant])} drafter" if drafter else ""
        lines.append((quant, f"{_size(size)}{with_drafter}, {found['bits_per_weight'][quant]:.2f} bits a weight"))
    return lines


def _cache_line(cache: dict[str, int]) -> str:
    return (
        f"{_size(cache['bytes_per_token'])} per token, {_size(cache['bytes_per_token_beyond_window'])} beyond the "
        f"window; {_size(cache['bytes'])} at {cache['positions']} positions, {_size(cache['bytes_q8'])} with --kv q8"
    )


def _drafter_lines(drafter: dict[str, Any] | None) -> list[tuple[str, str]]:
    if drafter is None:
        return [("drafter", "none found")]
    head = f"{drafter['centroids']} centroids" if drafter["centroids"] else f"head of {drafter['head_tokens']} tokens"
    return [
        ("drafter", drafter["folder"]),
        ("", f"{drafter['layers']} layers, hidden {drafter['hidden_size']}, {head}, {_count(drafter['parameters'])}"),
        ("fits", "yes" if drafter["fits"] else f"NO: {drafter['misfit']}"),
    ]


def _size(size: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size} bytes"


def _count(parameters: int) -> str:
    for unit, factor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if parameters >= factor:
            return f"{parameters / factor:.3g} {unit}"
    return str(parameters)
