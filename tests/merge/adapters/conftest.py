"""Adapter folders written by hand, and a tiny transformers model with adapters of PEFT."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

WriteAdapter = Callable[..., Path]
WRAPPER = "base_model.model."


@pytest.fixture
def write_adapter(tmp_path: Path) -> WriteAdapter:
    """`write(name, tensors, **config)`: a folder as PEFT writes it; plain LoRA unless told."""

    def write(name: str, tensors: Mapping[str, Tensor], **config: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        content = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], **config}
        (folder / "adapter_config.json").write_text(json.dumps(content))
        save_file(dict(tensors), folder / "adapter_model.safetensors")
        return folder

    return write


@pytest.fixture
def lora() -> Callable[..., dict[str, Tensor]]:
    """`lora(module, rows, columns, rank, seed)`: the two factors of a linear module."""

    def factors(module: str, rows: int, columns: int, rank: int = 2, seed: int = 0) -> dict:
        draw = torch.Generator().manual_seed(seed)
        return {
            f"{WRAPPER}{module}.lora_A.weight": torch.randn(rank, columns, generator=draw),
            f"{WRAPPER}{module}.lora_B.weight": torch.randn(rows, rank, generator=draw),
        }

    return factors


@pytest.fixture
def write_base(tmp_path: Path) -> Callable[..., Path]:
    """`write(tensors)`: a base, by default with what the other fixtures' adapters change."""

    def write(shapes: Mapping[str, tuple[int, ...]], name: str = "base", **made: Any) -> Path:
        draw = torch.Generator().manual_seed(9)
        tensors = {n: torch.randn(shape, generator=draw) for n, shape in shapes.items()}
        path = tmp_path / f"{name}.safetensors"
        save_file({**tensors, **made}, path)
        return path

    return write
