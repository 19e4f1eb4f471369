"""The OpenAI protocol over the engine: requests in, chunks and responses out.

Importing this package fills KServe's OpenAI seam (see `kserve_types`), so it must come before the
first import of `kserve.protocol.rest.openai`.
"""

from vdiff_kserve.openai.kserve_types import install

install()

from kserve.protocol.rest.openai import OpenAIGenerativeModel  # noqa: E402  needs the seam

__all__ = ["OpenAIGenerativeModel"]
