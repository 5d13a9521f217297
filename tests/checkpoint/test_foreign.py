"""What is no readable checkpoint is named for what it is."""

import zipfile
from pathlib import Path
from typing import Any

import pytest

from paceline.checkpoint.foreign import foreign, foreign_file, foreign_listing
from tests.fixtures.checkpoints import DRAFTER, TARGET, drafter_weights, target_weights, write_drafter, write_target

LAYER = "model.language_model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
            "compressed-tensors (pack-quantized, quantization_config in config.json)",
        ),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, "FP8 ("),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "AWQ (4 bits, "),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "GPTQ (4 bits, "),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes (4 bits, "),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "bitsandbytes (8 bits, "),
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}, "(NVFP4, "),
        ({"quantization_config": {"quant_method": "brand-new"}}, "brand-new ("),
        ({"quantization_config": {"bits": "four", "quant_method": ["?"]}}, "quantised with ['?'] ("),
        ({"quantization_config": {"group_size": 64}}, "a method that it does not name"),
        ({"text_config": {"quantization_config": {"quant_method": "gptq"}}}, "GPTQ"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "MLX, 4 bits"),
        ({"peft_type": "LORA", "base_model_name_or_path": "google/gemma-4-E2B-it"}, "on google/gemma-4-E2B-it"),
        ({"_diffusers_version": "0.40"}, "a model of diffusers"),
    ],
)
def test_configs(tmp_path: Path, config: dict[str, Any], says: str) -> None:
    found = foreign(tmp_path, {**TARGET, **config})
    assert found is not None
    assert says in found
    assert "; give" in found or "merge it" in found


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ([f"{LAYER}.weight_packed", f"{LAYER}.weight_scale", f"{LAYER}.weight_shape"], "W4A16"),
        ([f"{LAYER}.weight", f"{LAYER}.weight_scale"], "FP8 or INT8"),
        ([f"{LAYER}.weight", f"{LAYER}.weight_scale_inv"], "FP8 or INT8"),
        ([f"{LAYER}.weight", f"{LAYER}.weight_scale", f"{LAYER}.weight_scale_2"], "NVFP4"),
        ([f"{LAYER}.qweight", f"{LAYER}.qzeros", f"{LAYER}.scales"], "AWQ or GPTQ"),
        ([f"{LAYER}.qweight", f"{LAYER}.qzeros", f"{LAYER}.scales", f"{LAYER}.g_idx"], "GPTQ (tensor"),
        ([f"{LAYER}.weight", f"{LAYER}.weight.absmax", f"{LAYER}.weight.quant_map"], "bitsandbytes"),
        ([f"{LAYER}.weight", f"{LAYER}.SCB"], "bitsandbytes"),
        ([f"{LAYER}.weight", f"{LAYER}.scales", f"{LAYER}.biases"], "MLX"),
        (["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"], "an adapter (LoRA)"),
    ],
)
def test_tensor_names(tmp_path: Path, names: list[str], says: str) -> None:
    found = foreign(tmp_path, TARGET, names)
    assert found is not None
    assert says in found


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["config.json", "pytorch_model-00001-of-00002.bin"], "a PyTorch pickle"),
        (["params.json", "consolidated.00.pth"], "a PyTorch pickle"),
        (["adapter_config.json", "adapter_model.safetensors"], "an adapter (LoRA)"),
        (["adapter_config.json", "adapters.safetensors"], "an adapter (LoRA)"),
        (["adapter_config.json", "adapter_model.bin"], "an adapter (LoRA)"),
        (["model_index.json", "unet/diffusion_pytorch_model.safetensors"], "a pipeline of diffusers"),
        (["config.json", "model.safetensors.index.json"], "has none of them"),
        (["config.json", "tokenizer.json"], "but no weights"),
        (["gemma-4-E2B-it.litertlm"], "a model for LiteRT"),
        (["gemma.task"], "a model for LiteRT"),
        (["gemma.zip"], "an archive (gemma.zip); unpack it"),
        (["onnx/model.onnx", "config.json"], "ONNX"),
        (["model.weights.h5"], "Keras"),
        (["_METADATA", "manifest.ocdbt"], "JAX"),
    ],
)
def test_listings(tmp_path: Path, names: list[str], says: str) -> None:
    assert says in str(foreign_listing(names))
    for name in names:
        if "/" not in name:
            (tmp_path / name).touch()
    if all("/" not in name for name in names):
        assert says in str(foreign(tmp_path, None))


def test_what_is_read_is_not_foreign(tmp_path: Path) -> None:
    write_target(tmp_path / "target")
    write_drafter(tmp_path / "drafter")
    assert foreign(tmp_path / "target", TARGET, target_weights()) is None
    assert foreign(tmp_path / "drafter", DRAFTER, drafter_weights()) is None
    (tmp_path / "converted").mkdir()
    (tmp_path / "converted" / "config.json").touch()
    (tmp_path / "converted" / "model.paceline").touch()
    assert foreign(tmp_path / "converted", {**TARGET, "quantization_config": {}, "quantization": None}) is None
    assert foreign(tmp_path / "converted", {**TARGET, "text_config": ["damaged"]}) is None
    assert foreign(tmp_path / "absent", None) is None
    assert foreign_listing(["model.safetensors", "pytorch_model.bin"]) is None
    assert foreign_listing(["gemma-Q4_0.gguf", "config.json"]) is None
    assert foreign_listing([]) is None


def test_files(tmp_path: Path) -> None:
    def says(name: str, content: bytes = b"") -> str:
        (tmp_path / name).write_bytes(content)
        return foreign_file(tmp_path / name)

    assert "is a model for LiteRT (MediaPipe), which cannot be read; give" in says("gemma-4-E2B-it.litertlm")
    assert "is an archive; unpack it and give the folder" in says("gemma.zip")
    assert "is a PyTorch pickle, which can run any program" in says("consolidated.00.pth")
    assert "give the folder that holds it" in says("model-00001-of-00002.safetensors")
    assert "give the folder that holds it" in says("config.json", b"{}")
    assert "is no model file that is known" in says("notes.txt", b"text")
    with zipfile.ZipFile(tmp_path / "renamed", "w") as archive:
        archive.writestr("a", "b")
    assert "is an archive or a PyTorch pickle" in foreign_file(tmp_path / "renamed")
