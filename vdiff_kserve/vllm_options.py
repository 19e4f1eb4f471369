"""Options of `vllm serve` that this server does not have, and what to do about each.

People come with command lines that they wrote for vLLM. What is the same there has the same name
here; the rest is refused when the server starts, with a hint from this table.
"""

from __future__ import annotations

from vdiff_kserve.command_line import plain

LEAVE_OUT = "leave it out"

_HINTS: dict[tuple[str, ...], str] = {
    # The server
    ("config",): "set environment variables, VDIFF_ and an option's name, instead of a file",
    ("uvicorn_log_level",): "use --log_level",
    ("disable_uvicorn_access_log", "disable_access_log_for_endpoints"): "use --log_config_file",
    ("disable_log_requests", "enable_log_requests", "max_log_len", "disable_log_stats"): (
        f"requests are logged in one line each, without their texts; {LEAVE_OUT}, or use "
        "--log_level warning"
    ),
    ("root_path",): "let the proxy in front strip the prefix",
    ("uds",): "the server listens on --host and --port only",
    ("ssl_ca_certs", "ssl_cert_reqs", "enable_ssl_refresh"): (
        "only --ssl_certfile and --ssl_keyfile are read; check clients in a proxy in front"
    ),
    ("allow_credentials", "allowed_methods", "allowed_headers"): "use --allowed_origins alone",
    ("disable_fastapi_docs",): f"the page is off unless --enable_docs_url asks for it; {LEAVE_OUT}",
    ("middleware", "logits_processors", "tool_parser_plugin", "reasoning_parser_plugin"): (
        "no code beside the server's own is run"
    ),
    ("enable_request_id_headers", "enable_server_load_tracking", "enable_prompt_tokens_details"): (
        f"this is always on; {LEAVE_OUT}"
    ),
    ("enable_force_include_usage",): "requests ask for it with stream_options.include_usage",
    ("return_tokens_as_token_ids",): "requests ask for it with return_tokens_as_token_ids",
    ("api_server_count", "disable_frontend_multiprocessing"): (
        f"one process serves HTTP; {LEAVE_OUT}"
    ),
    ("shutdown_timeout",): "use --grace_period",
    ("enable_sleep_mode",): "use --enable_repository_control, which unloads and loads the model",
    ("enable_tokenizer_info_endpoint",): f"there is /tokenize only; {LEAVE_OUT}",
    # The model
    ("tokenizer", "tokenizer_mode", "skip_tokenizer_init"): (
        f"the tokenizer is the checkpoint's own; {LEAVE_OUT}"
    ),
    ("hf_token",): "set the environment variable HF_TOKEN",
    ("download_dir",): "set the environment variable HF_HOME",
    ("load_format", "model_loader_extra_config"): (
        f"weights are read from safetensors files; {LEAVE_OUT}"
    ),
    ("code_revision", "tokenizer_revision"): "use --revision; code in a checkpoint is never run",
    ("hf_overrides", "hf_config_path"): "edit the checkpoint's config.json",
    ("task", "runner", "convert", "model_impl"): f"models only generate text; {LEAVE_OUT}",
    ("enable_lora", "lora_modules", "max_loras", "max_lora_rank", "max_cpu_loras"): (
        "adapters are not served; merge one into the checkpoint"
    ),
    ("limit_mm_per_prompt", "mm_processor_kwargs", "allowed_local_media_path"): (
        f"models read text only; {LEAVE_OUT}"
    ),
    ("cpu_offload_gb",): "use --device_map auto",
    # Requests
    ("seed",): "requests carry their own seed",
    ("max_logprobs",): f"requests may ask for 20; {LEAVE_OUT}",
    ("generation_config", "override_generation_config"): (
        "name the defaults of requests as options, such as --temperature or --top_p"
    ),
    ("chat_template_content_format", "response_role"): f"messages are texts; {LEAVE_OUT}",
    ("reasoning_parser", "enable_reasoning"): f"models have no separate reasoning; {LEAVE_OUT}",
    ("guided_decoding_backend", "structured_outputs_config"): (
        f"grammars are always followed by llguidance; {LEAVE_OUT}"
    ),
    ("speculative_config", "speculative_model", "num_speculative_tokens"): (
        "a pass writes several tokens already; --policy and --apd_model say which"
    ),
    ("diffusion_config",): "name the decoding as options, such as --policy or --diffusion_steps",
    # The engine
    ("enable_chunked_prefill", "max_num_partial_prefills", "long_prefill_token_threshold"): (
        f"long prompts are always computed in parts, as --max_num_batched_tokens says; {LEAVE_OUT}"
    ),
    ("swap_space", "preemption_mode", "kv_offloading_size"): (
        f"a request keeps its cache until it ends; {LEAVE_OUT}"
    ),
    ("num_gpu_blocks_override", "kv_cache_memory_bytes"): "use --kv_cache_memory",
    (
        "kv_cache_dtype",
        "calculate_kv_scales",
    ): f"keys and values have the type --dtype; {LEAVE_OUT}",
    ("kv_transfer_config", "kv_events_config"): "keys and values are not moved between servers",
    ("prefix_caching_hash_algo", "scheduling_policy", "async_scheduling", "attention_backend"): (
        f"there is one way only; {LEAVE_OUT}"
    ),
    ("compilation_config", "optimization_level", "cudagraph_capture_sizes", "o"): (
        f"--enforce_eager is the only choice; {LEAVE_OUT}"
    ),
    ("tp",): "use --tensor_parallel_size",
    (
        "dp",
        "data_parallel_size",
        "data_parallel_backend",
        "data_parallel_address",
    ): "use --replicas",
    ("pp", "pipeline_parallel_size", "decode_context_parallel_size"): (
        "use --tensor_parallel_size, or --replicas"
    ),
    ("nnodes", "node_rank", "master_addr", "master_port", "headless"): (
        "use --replicas with --ray_address"
    ),
    ("enable_expert_parallel",): (f"experts are shared out by --tensor_parallel_size; {LEAVE_OUT}"),
    ("distributed_executor_backend", "disable_custom_all_reduce"): (
        f"--tensor_parallel_size and --replicas choose it; {LEAVE_OUT}"
    ),
}
HINTS = {name: hint for names, hint in _HINTS.items() for name in names}
"""vLLM's option, with underscores -> what to do here."""


def hint_for(argument: str) -> str | None:
    """What to do about an argument that is vLLM's; None when it is not."""
    if argument == "serve":
        return "name the model by --model, without the word serve"
    name = plain(argument).lower()
    short = name.rstrip("0123456789")
    return HINTS.get(name) or HINTS.get(name.removeprefix("no_")) or HINTS.get(short)
