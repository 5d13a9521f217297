"""Names what people hand in that is no checkpoint to read, and says what to give instead.

Quantised safetensors, weights of other frameworks, adapters, and files that are no weights at all. Nothing here opens a
file of weights; names, `config.json` and the first bytes of a file are enough.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

INSTEAD = "give the model it was made from (bf16 safetensors), or a GGUF of it"
LISTED = 10_000  # names of a folder that are looked at

# quant_method of config.json: the method's name
METHODS = {
    "compressed-tensors": "compressed-tensors",
    "awq": "AWQ",
    "gptq": "GPTQ",
    "auto-round": "AutoRound",
    "bitsandbytes": "bitsandbytes",
    "fp8": "FP8",
    "fbgemm_fp8": "FP8",
    "modelopt": "ModelOpt (FP8 or NVFP4)",
    "mxfp4": "MXFP4 safetensors",
    "torchao": "torchao",
    "quanto": "Quanto",
    "hqq": "HQQ",
    "aqlm": "AQLM",
    "eetq": "EETQ",
    "vptq": "VPTQ",
}
# endings of tensor names that no Gemma has: what writes them. The first one that is found names the format.
TENSOR_ENDINGS = (
    (("lora_A.weight", "lora_B.weight", "lora_A.default.weight"), "an adapter (LoRA)"),
    ((".weight_packed",), "compressed-tensors (4-bit integers, W4A16)"),
    ((".weight_scale_2",), "ModelOpt (NVFP4)"),
    ((".g_idx",), "GPTQ"),
    ((".qweight", ".qzeros"), "AWQ or GPTQ"),
    ((".absmax", ".quant_map", ".SCB"), "bitsandbytes"),
    ((".weight_scale", ".weight_scale_inv"), "FP8 or INT8"),
)
# files by name: what they are. Looked for in this order, in a folder without safetensors and GGUF.
FILES = (
    (r".*\.(litertlm|task|tflite)", "a model for LiteRT (MediaPipe)"),
    (r".*\.(zip|tar|tgz|tar\.gz|tar\.xz|7z)", "an archive; unpack it and give the folder"),
    (r".*\.onnx(_data)?", "a model for ONNX Runtime"),
    (r".*\.(h5|keras)", "a model for Keras"),
    (r"(_METADATA|_CHECKPOINT_METADATA|checkpoint|manifest\.ocdbt)", "a checkpoint for JAX (Orbax)"),
    (r".*\.(mlmodelc|mlpackage)", "a model for Core ML"),
    (r".*\.llamafile", "a program with a model in it (llamafile)"),
    (r".*\.nemo", "a model for NeMo"),
    (r"(pytorch_model|consolidated|model|adapter_model).*\.(bin|pth|pt|ckpt)", "a PyTorch pickle"),
    (r".*\.(pth|pt|ckpt|pkl)", "a PyTorch pickle"),
)
PICKLE = "which can run any program when it is opened, so it is not read; give the model as safetensors or GGUF"


def foreign(folder: Path, config: Mapping[str, Any] | None, tensor_names: Iterable[str] = ()) -> str | None:
    """What a model folder is, if it is known but none to read; None otherwise.

    Args:
        folder: the folder; only the names in it are read.
        config: its `config.json`, or None if it has none.
        tensor_names: names in its safetensors files, as far as they are known.

    Returns:
        The end of a message that begins with the folder's name: "is quantised with GPTQ (...), which ...; give ...".
    """
    names = _names(folder)
    found = (config is not None and foreign_config(config)) or _foreign_tensors(tensor_names)
    return found or foreign_listing(names)


def foreign_config(config: Mapping[str, Any]) -> str | None:
    """As `foreign`, by `config.json` alone."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        quantised = part.get("quantization_config")
        if isinstance(quantised, Mapping) and quantised:
            return _quantised(_method(quantised))
        if isinstance(part.get("quantization"), Mapping) and part["quantization"]:
            bits = part["quantization"].get("bits")
            return _quantised(f"MLX{f', {bits} bits' if type(bits) is int else ''}")
    if "peft_type" in config:
        return _adapter(config.get("base_model_name_or_path"))
    if "_diffusers_version" in config:
        return "is a model of diffusers, for images; give a Gemma text model"
    return None


def foreign_listing(names: Iterable[str]) -> str | None:
    """As `foreign`, by the names of a folder's or a repository's files alone ("/" between folders)."""
    names = set(names)
    bare = {name.rpartition("/")[2] for name in names}
    weights = {name for name in bare if name.endswith((".safetensors", ".gguf", ".paceline"))}
    if "model_index.json" in names:
        return "is a pipeline of diffusers, for images; give a Gemma text model"
    if "adapter_config.json" in names and weights <= {"adapter_model.safetensors", "adapters.safetensors"}:
        return _adapter(None)
    if weights:
        return None
    for pattern, kind in FILES:
        for name in sorted(bare):
            if re.fullmatch(pattern, name, re.IGNORECASE):
                return f"holds {_with_advice(kind, name)}"
    if "model.safetensors.index.json" in names:
        return "lists its weights (model.safetensors.index.json) but has none of them; download the files it lists"
    if "config.json" in names:
        return "has a config.json but no weights; download its *.safetensors, or give a GGUF"
    return None


def foreign_file(path: Path) -> str:
    """What a file is that is no GGUF; the end of a message that begins with its name."""
    for pattern, kind in FILES:
        if re.fullmatch(pattern, path.name, re.IGNORECASE):
            return f"is {_with_advice(kind)}"
    if path.name.endswith((".safetensors", ".safetensors.index.json", "config.json", ".paceline")):
        return "is one file of a model; give the folder that holds it with its config.json"
    try:
        if zipfile.is_zipfile(path):  # torch.save writes archives too
            return f"is {_with_advice('an archive or a PyTorch pickle')}"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return "is no model file that is known; give a GGUF, or a folder with config.json and safetensors"


def _with_advice(kind: str, name: str = "") -> str:
    named = f" ({name})" if name else ""
    if "pickle" in kind:
        return f"{kind}{named}, {PICKLE}"
    if ";" in kind:
        kind, _, advice = kind.partition(";")
        return f"{kind}{named};{advice}"
    return f"{kind}{named}, which cannot be read; {INSTEAD}"


def _quantised(by: str) -> str:
    return f"is quantised with {by}, which cannot be read; {INSTEAD}"


def _adapter(base: object) -> str:
    of = f" on {base[:80]}" if isinstance(base, str) and base else ""
    return (
        f"is an adapter (LoRA){of}, not a model; merge it into its model (peft: merge_and_unload) and give the result"
    )


def _method(quantised: Mapping[str, Any]) -> str:
    method = str(quantised.get("quant_method", ""))[:40]
    name = METHODS.get(method.lower(), f"{method or 'a method that it does not name'}")
    details = [str(quantised[key])[:40] for key in ("format", "quant_algo") if isinstance(quantised.get(key), str)]
    bits = next((quantised[key] for key in ("bits", "w_bit", "weight_bits") if type(quantised.get(key)) is int), None)
    for key, number in (("load_in_4bit", 4), ("load_in_8bit", 8)):
        bits = number if quantised.get(key) is True else bits
    details += [f"{bits} bits"] if bits else []
    return f"{name} ({', '.join([*details, 'quantization_config in config.json'])})"


def _foreign_tensors(names: Iterable[str]) -> str | None:
    names = list(names)
    for endings, kind in TENSOR_ENDINGS:
        found = next((name for name in names if name.endswith(endings)), None)
        if found and "adapter" in kind:
            return _adapter(None)
        if found:
            return _quantised(f"{kind} (tensor {found[:80]})")
    scales = {name.removesuffix(".scales") for name in names if name.endswith(".scales")}
    both = next((name for name in names if name.endswith(".biases") and name.removesuffix(".biases") in scales), None)
    return _quantised(f"MLX (tensor {both[:80]})") if both else None


def _names(folder: Path) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry, _ in zip(entries, range(LISTED), strict=False)}
    except OSError:
        return set()
