"""Models that transformers runs are tried out when they are loaded, also on a GPU: a stand-in of
one, that does not pin what is there already."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DiffusionGemmaForBlockDiffusion

from tests.golden import GOLDEN_DIR
from tests.gpu_stand_in import GPU, gpu_stand_in, move_there
from tests.models.causal_folders import write_causal
from vdiff_kserve.models import diffusion_gemma, transformers_model
from vdiff_kserve.models.transformers_folder import from_folder


def read_onto_the_gpu(
    model_class: Any, folder: Path, loader: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """The model that `loader` is to find in `folder`; transformers itself cannot read it there."""
    model = from_folder(model_class, folder, "cpu", torch.float32)
    move_there(model)
    monkeypatch.setattr(loader, "from_folder", lambda *_: model)
    return model


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_causal_models_keep_their_cache(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_causal(name, tmp_path)
    read_onto_the_gpu(AutoModelForCausalLM, tmp_path, transformers_model, monkeypatch)
    with gpu_stand_in(monkeypatch):
        model, _, cached = transformers_model.load_transformers_model(tmp_path, GPU, torch.float32)
    assert model.device == GPU
    assert cached


def test_diffusion_gemma_computes_what_transformers_computes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = GOLDEN_DIR / "diffusion_gemma"
    stock = read_onto_the_gpu(DiffusionGemmaForBlockDiffusion, folder, diffusion_gemma, monkeypatch)
    stock.set_experts_implementation("eager")  # a CPU lacks operations of the others
    with gpu_stand_in(monkeypatch):
        gemma, spec = diffusion_gemma.load_diffusion_gemma(folder, GPU)
    assert gemma.device == GPU
    assert spec.block_length == stock.config.canvas_length
