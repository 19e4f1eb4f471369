"""The architectures, written natively in PyTorch, and the checkpoint loader."""

from vdiff_kserve.models.batch import ForwardBatch, KeyValueStore, RowSpan
from vdiff_kserve.models.causal import load_causal_model
from vdiff_kserve.models.checkpoint_config import CheckpointError, Hints
from vdiff_kserve.models.cpu_kernels import get_kernels_ready
from vdiff_kserve.models.decoder import Decoder, DecoderConfig, LayerwisePass
from vdiff_kserve.models.host_memory import (
    bound_kernel_caches,
    free_host_memory,
    keep_freed_memory,
)
from vdiff_kserve.models.language_model import ForwardPass, LanguageModel, RenoisingModel
from vdiff_kserve.models.loader import load_causal_decoder, load_decoder
from vdiff_kserve.models.packed_linear import can_pack, pack_linear_layers
from vdiff_kserve.models.placement import SPREADS
from vdiff_kserve.models.precision import choose_device, choose_dtype
from vdiff_kserve.models.processors import fit_threads
from vdiff_kserve.models.quantization import QUANTIZATIONS
from vdiff_kserve.models.reuse_graphs import MOST_ROWS, ReuseGraphs
from vdiff_kserve.models.served import check_folder, load_served_model
from vdiff_kserve.models.sharding import VocabShard
from vdiff_kserve.models.spec import ModelSpec, Renoising
from vdiff_kserve.models.tokenizer import (
    check_same_vocabulary,
    load_tokenizer,
    read_chat_template,
    with_end_of_turn,
)

__all__ = [
    "MOST_ROWS",
    "QUANTIZATIONS",
    "SPREADS",
    "CheckpointError",
    "Decoder",
    "DecoderConfig",
    "ForwardBatch",
    "ForwardPass",
    "Hints",
    "KeyValueStore",
    "LanguageModel",
    "LayerwisePass",
    "ModelSpec",
    "Renoising",
    "RenoisingModel",
    "ReuseGraphs",
    "RowSpan",
    "VocabShard",
    "bound_kernel_caches",
    "can_pack",
    "check_folder",
    "check_same_vocabulary",
    "choose_device",
    "choose_dtype",
    "fit_threads",
    "free_host_memory",
    "get_kernels_ready",
    "keep_freed_memory",
    "load_causal_decoder",
    "load_causal_model",
    "load_decoder",
    "load_served_model",
    "load_tokenizer",
    "pack_linear_layers",
    "read_chat_template",
    "with_end_of_turn",
]
