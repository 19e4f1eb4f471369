"""Every metric of the server, by name. `docs/monitoring.md` has the same list for people."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram, Info, disable_created_metrics

# The text format has no place for creation times: each would be one more series.
disable_created_metrics()

MODEL = ("model_name",)
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
SECONDS_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
SECONDS_OF_A_PHASE = (0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5, 30)
FEW = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
MANY = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)

ENDPOINTS = ("chat", "completion", "responses", "v1", "v2")
FINISH_REASONS = ("stop", "length", "abort", "error")
FORWARD_KINDS = ("refresh", "reuse", "commit", "auxiliary")
TOKEN_SOURCES = ("computed", "cached")
PHASES = ("plan", "forward", "sample", "apply")
ERROR_TYPES = (
    "invalid_request",
    "unauthorized",
    "unknown_model",
    "too_large",
    "rate_limited",
    "queue_full",
    "queue_timeout",
    "request_timeout",
    "unavailable",
    "client_closed",
    "internal",
)

# Requests.
REQUEST_SUCCESS = Counter(
    "vdiff_request_success",
    "Requests whose answers are all complete.",
    [*MODEL, "endpoint"],
)
ERRORS = Counter(
    "vdiff_errors",
    "Requests that were refused, failed or were given up by their client, by reason.",
    [*MODEL, "endpoint", "type"],
)
ANSWERS = Counter(
    "vdiff_answers",
    "Answers (choices) by finish reason: stop, length, abort or error.",
    [*MODEL, "finish_reason"],
)
RUNNING = Gauge("vdiff_requests_running", "Answers in the batch.", MODEL)
WAITING = Gauge("vdiff_requests_waiting", "Answers in the queue.", MODEL)
STUCK = Gauge(
    "vdiff_engine_stuck",
    "1 while a round takes far longer than rounds of its size do, else 0.",
    MODEL,
)

# Times of requests.
LATENCY = Histogram(
    "vdiff_request_latency_seconds",
    "Time from a successful request's arrival to the end of its last answer.",
    MODEL,
    buckets=SECONDS,
)
FIRST_TEXT = Histogram(
    "vdiff_time_to_first_text_seconds",
    "Time from a request's arrival to its first text.",
    MODEL,
    buckets=SECONDS,
)
QUEUE_TIME = Histogram(
    "vdiff_queue_time_seconds",
    "Time of an answer in the queue; observed when its first tokens come.",
    MODEL,
    buckets=SECONDS,
)
INTER_CHUNK = Histogram(
    "vdiff_inter_chunk_seconds",
    "Time between two consecutive pieces of an answer's text.",
    MODEL,
    buckets=SECONDS_PER_TOKEN,
)
TIME_PER_TOKEN = Histogram(
    "vdiff_time_per_output_token_seconds",
    "Time of a complete answer outside the queue, divided by its tokens.",
    MODEL,
    buckets=SECONDS_PER_TOKEN,
)
RUNNING_TIME = Histogram(
    "vdiff_running_seconds",
    "Time of a complete answer outside the queue.",
    MODEL,
    buckets=SECONDS,
)
RUNNING_TO_TEXT = Histogram(
    "vdiff_running_to_first_text_seconds",
    "Time of a complete answer from the end of its queueing to its first text.",
    MODEL,
    buckets=SECONDS,
)
RUNNING_FROM_TEXT = Histogram(
    "vdiff_running_from_first_text_seconds",
    "Time of a complete answer from its first text to its end.",
    MODEL,
    buckets=SECONDS,
)

# Tokens.
PROMPT_TOKENS = Counter(
    "vdiff_prompt_tokens", "Prompt tokens of requests, counted when a request is queued.", MODEL
)
GENERATION_TOKENS = Counter(
    "vdiff_generation_tokens", "Tokens of answers, counted when they become final.", MODEL
)
DECODED_TOKENS = Counter(
    "vdiff_parallel_tokens_decoded",
    "Tokens that denoising steps wrote, including those that no answer kept.",
    MODEL,
)
ANSWER_PROMPT_TOKENS = Histogram(
    "vdiff_answer_prompt_tokens", "Prompt tokens of a complete answer.", MODEL, buckets=MANY
)
ANSWER_GENERATION_TOKENS = Histogram(
    "vdiff_answer_generation_tokens", "Tokens of a complete answer.", MODEL, buckets=MANY
)
TOKENS_PER_FORWARD = Histogram(
    "vdiff_tokens_per_forward",
    "Tokens of a complete answer, divided by the forward passes it took part in.",
    MODEL,
    buckets=FEW,
)

# Denoising.
FORWARDS = Counter(
    "vdiff_forwards",
    "Forward passes, counted once per answer that took part, by kind: refresh, reuse or commit; "
    "auxiliary: passes of the auxiliary model.",
    [*MODEL, "kind"],
)
FORWARD_TOKENS = Counter(
    "vdiff_forward_tokens",
    "Tokens of forward passes, by source: computed, or read from the cache (cached).",
    [*MODEL, "source"],
)
ATTENDED = Counter(
    "vdiff_forward_attended",
    "Pairs of a computed token and a token that it attends to, in one layer of a forward pass.",
    MODEL,
)
BLOCK_STEPS = Histogram(
    "vdiff_block_denoising_steps", "Denoising steps of a finished block.", MODEL, buckets=FEW
)
APD_ACCEPTED = Histogram(
    "vdiff_apd_accepted_tokens",
    "Tokens of a draft that the auxiliary model accepted.",
    MODEL,
    buckets=FEW,
)
ROUND_ROWS = Histogram("vdiff_round_rows", "Answers that took part in a round.", MODEL, buckets=FEW)
ROUND_SECONDS = Histogram(
    "vdiff_round_seconds",
    "Time of a round by phase: plan, forward, sample, apply.",
    [*MODEL, "phase"],
    buckets=SECONDS_OF_A_PHASE,
)

# Caches.
HIT_RATE = Gauge(
    "vdiff_kv_cache_hit_rate",
    "Share of the tokens of the last 256 rounds that were read from the cache.",
    MODEL,
)
KV_USED = Gauge(
    "vdiff_kv_slots_used", "Tokens of the cache that running answers have reserved.", MODEL
)
KV_TOTAL = Gauge("vdiff_kv_slots_total", "Tokens that the cache can hold.", MODEL)
PREFIX_QUERIED = Counter(
    "vdiff_prefix_cache_queried_tokens", "Prompt tokens of answers that began.", MODEL
)
PREFIX_HIT = Counter(
    "vdiff_prefix_cache_hit_tokens",
    "Prompt tokens of answers that began and that the prefix cache held.",
    MODEL,
)

# The model.
LOAD_SECONDS = Gauge(
    "vdiff_model_load_seconds", "Seconds that loading and warming up the model took.", MODEL
)
MODEL_INFO = Info("vdiff_model", "The model that is served, in labels; always 1.", MODEL)
