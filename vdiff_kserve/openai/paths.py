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


def without_prefix(path: str) -> bool:
    """Whether a path would be one of OpenAI's below their prefix: the base URL lacks it."""
    return path in (CHAT, COMPLETIONS, FIM, RESPONSES) or path.startswith("/models")
