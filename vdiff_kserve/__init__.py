"""Serving of diffusion language models through KServe, and from Python."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vdiff_kserve.llm import LLM, AsyncLLM
    from vdiff_kserve.llm_values import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "AsyncLLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    """Load the Python API when it is asked for: it needs torch, which takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("vdiff_kserve.llm"), name)
