"""What a path of the HTTP server stands for: its protocol, and who may use it."""

from __future__ import annotations

import re

PREFIXES = ("/openai/v1", "/v1")
"""Where OpenAI's routes are."""
CHAT = "/chat/completions"
COMPLETIONS = "/completions"
RESPONSES = "/responses"
FIM = "/fim/completions"

OPEN = re.compile(
    r"/|/health|/ping|/version|/metrics|/v2/health/(live|ready)|/v2/models/[^/]+(/versions/[^/]+)?/ready"
)
"""What probes and scrapers ask, who have no key."""
PAGES = ("/docs", "/docs/oauth2-redirect", "/openapi.json")
"""The interactive page and what it loads; a browser opens them without a key."""
PREDICT = re.compile(r"/v1/models/[^/]+:predict")
KSERVE_V1 = re.compile(r"/v1/models/[^/]+:\w+")
ABSENT: dict[tuple[str, ...], str] = {
    ("embeddings", "rerank", "score", "pooling", "classify", "moderations"): (
        "Models here write text; they give no embeddings, scores or classes."
    ),
    ("audio", "images", "videos", "realtime"): "Models here read and write text only.",
    (
        *("files", "uploads", "batches", "conversations", "assistants", "threads"),
        *("vector_stores", "containers", "fine_tuning", "evals"),
    ): "Nothing is stored here; every request holds all that its answer needs.",
    ("messages",): "Anthropic's protocol is not spoken here; use /v1/chat/completions.",
    ("api",): "Ollama's protocol is not spoken here; use /v1/chat/completions.",
    ("generate", "generate_stream", "invocations"): "Use /v1/completions or /v1/chat/completions.",
}
"""First part of paths that other servers have -> why this one has not."""
INFER = re.compile(r"/v2/models/[^/]+(/versions/[^/]+)?/infer")


def endpoint_of(method: str, path: str) -> str | None:
    """Which of the metrics' endpoints a request is for; None when it asks for no answer."""
    if method != "POST":
        return None
    if path in [prefix + CHAT for prefix in PREFIXES]:
        return "chat"
    if path in [prefix + each for prefix in PREFIXES for each in (COMPLETIONS, FIM)]:
        return "completion"
    if path in [prefix + RESPONSES for prefix in PREFIXES]:
        return "responses"
    if PREDICT.fullmatch(path):
        return "v1"
    return "v2" if INFER.fullmatch(path) else None


def is_open(path: str) -> bool:
    """Whether a path is answered without a key and without counting for the rate limit."""
    return OPEN.fullmatch(path) is not None


def speaks_openai(path: str) -> bool:
    """Whether errors on a path have OpenAI's shape; KServe's V1 and V2 have their own."""
    return KSERVE_V1.fullmatch(path) is None and not path.startswith("/v2/")


def why_absent(path: str) -> str:
    """Why there is no such path, or what to ask instead, in a sentence; empty when unknown."""
    if path in (CHAT, COMPLETIONS, FIM, RESPONSES) or path.startswith("/models"):
        return "OpenAI's routes are below /v1, which belongs to a client's base URL."
    inner = path.removeprefix("/openai").removeprefix("/v1")
    if inner.startswith(PREFIXES):
        return "The path has /v1 twice: a client's base URL and its paths name it once."
    first = inner.strip("/").partition("/")[0]
    return next((why for names, why in ABSENT.items() if first in names), "")
