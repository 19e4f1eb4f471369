"""What a path of the HTTP server stands for: its protocol, and who may use it."""

from __future__ import annotations

import difflib
import re

PREFIXES = ("/v1", "/openai/v1")
"""Where OpenAI's routes are, the usual place first: routes are compared one after the other."""
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
ROUTES = (CHAT, COMPLETIONS, RESPONSES, FIM)
MAX_COMPARED = 40
"""Characters of an unknown path that are compared with those."""
DOCS = ("/docs", "/redoc")
SLASH_FOR_COLON = re.compile(r"(/v1/models/[^/]{1,80})/(predict|explain)")
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
    if path in DOCS:
        return "The page is off; the server shows it at /docs with --enable_docs_url true."
    if named := SLASH_FOR_COLON.fullmatch(path):
        return f"KServe's V1 writes a colon before the verb: {named[1]}:{named[2]}."
    first = inner.strip("/").partition("/")[0]
    if why := next((why for names, why in ABSENT.items() if first in names), ""):
        return why
    near = difflib.get_close_matches(inner[:MAX_COMPARED], ROUTES, n=1, cutoff=0.8)
    return f"Did you mean {PREFIXES[0]}{near[0]}?" if near and inner not in ROUTES else ""
