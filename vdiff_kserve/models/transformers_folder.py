"""What transformers' own class makes of a checkpoint folder, and which folders are refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vdiff_kserve.models.checkpoint_config import MAX_CONTEXT, CheckpointConfig, CheckpointError
from vdiff_kserve.models.loader import list_tensors
from vdiff_kserve.models.matching import COMPUTED
from vdiff_kserve.models.safetensors_file import StoredTensor
from vdiff_kserve.models.tensor_names import NUMBER

LAYER_FIELDS = {"num_hidden_layers", "num_layers", "n_layers", "n_layer"}
WIDTH_FIELDS = {"hidden_size", "n_embd", "d_model", "vocab_size"}
SIZE_ENDINGS = ("intermediate_size", "head_dim", "num_attention_heads", "n_head", "experts")
SPECULATION = re.compile(r"(^|\.)mtp(_layers|_block)?\.")
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def from_folder(
    model_class: Any, folder: Path, device: torch.device | str, dtype: torch.dtype
) -> Any:
    """What transformers' own `model_class` makes of a folder, in eval mode without gradients.

    No code of the checkpoint is run.

    Raises:
        CheckpointError: the folder is not sound, transformers cannot load it, or its tensors do not
            fit its config.
    """
    _check_sizes(CheckpointConfig.read(folder), list_tensors(folder))
    try:
        model, report = model_class.from_pretrained(
            folder,
            dtype=dtype,
            device_map={"": device},
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are told below
        )
    except Exception as error:
        raise CheckpointError(f"{folder}: transformers cannot load it: {error!r}") from error
    unread = {key for key in report["unexpected_keys"] if not _is_of_no_use(key, model.config)}
    found = report | {"unexpected_keys": unread}
    kinds = ("missing_keys", "mismatched_keys", "unexpected_keys")
    wrong = {name: found[name] for name in kinds if found[name]}
    if wrong:
        found = "; ".join(f"{name}: {sorted(map(str, keys))[:8]}" for name, keys in wrong.items())
        raise CheckpointError(f"{folder}: tensors do not fit config.json. {found}")
    return model.requires_grad_(False).eval()


def _is_of_no_use(name: str, config: Any) -> bool:
    """Whether a tensor without a place in transformers' model is one that published checkpoints
    have beside their weights: what follows from the configuration, or heads that predict further
    tokens for speculation. transformers itself knows those of some models by name, and drops any
    other tensor with a warning; here any other is taken for a sign of a wrong `config.json`."""
    if COMPUTED.search(name) or SPECULATION.search(name):
        return True
    text = config.get_text_config()
    layers = getattr(text, "num_hidden_layers", 0)
    further = getattr(text, "num_nextn_predict_layers", None) or 0
    layer = LAYER.search(name)
    return layer is not None and layers <= int(layer[1]) < layers + further


def _check_sizes(config: CheckpointConfig, stored: Mapping[str, StoredTensor]) -> None:
    """Refuse what transformers would take memory for, to find then that it does not fit.

    Raises:
        CheckpointError: a size that the files contradict.
    """
    layers = max((int(i) for name in stored for i in NUMBER.findall(name)), default=0) + 1
    sides = {side for tensor in stored.values() for side in tensor.shape}
    longest = max(sides, default=0)
    for part in (config, config.part("text_config")):
        for field, value in part.integers_by_name().items():
            if field in LAYER_FIELDS and not 0 < value <= layers:
                raise part.error(field, f"says {value} layers, the files have {layers} at most")
            if field in WIDTH_FIELDS and value not in sides:
                raise part.error(field, f"says {value}, and no tensor has a side of that")
            if field.endswith(SIZE_ENDINGS) and value > longest:
                raise part.error(field, f"says {value}, the longest side of a tensor is {longest}")
            if abs(value) > MAX_CONTEXT:
                raise part.error(field, f"{value} is no size of a model")
