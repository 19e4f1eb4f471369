"""Options of `vllm serve` that this server does not have, and what to do about each.

People come with command lines that they wrote for vLLM. What is the same there has the same name
here; the rest is refused when the server starts, with a hint from this table.
"""

from __future__ import annotations

from vdiff_kserve.command_line import plain

LEAVE_OUT = "leave it out"
VLLM_API_KEY = "VLLM_API_KEY"
"""The environment variable with vLLM's key: who sets it does not expect an open server."""

_HINTS: dict[str, str] = {
    # The server
    "config": "set environment variables, VDIFF_ and an option's name, instead of a file",
    "uvicorn_log_level": "use --log_level",
    "disable_uvicorn_access_log disable_access_log_for_endpoints": "use --log_config_file",
    (
        "disable_log_requests enable_log_requests enable_log_outputs enable_log_deltas "
        "max_log_len disable_log_stats aggregate_engine_logging"
    ): (
        f"requests are logged in one line each, without their texts; {LEAVE_OUT}, or use "
        "--log_level warning"
    ),
    "root_path": "let the proxy in front strip the prefix",
    "uds": "the server listens on --host and --port only",
    "ssl_ca_certs ssl_cert_reqs ssl_ciphers enable_ssl_refresh": (
        "only --ssl_certfile and --ssl_keyfile are read; check clients in a proxy in front"
    ),
    "allow_credentials allowed_methods allowed_headers": "use --allowed_origins alone",
    "disable_fastapi_docs enable_offline_docs": (
        f"the page is off unless --enable_docs_url asks for it; {LEAVE_OUT}"
    ),
    (
        "middleware tool_parser_plugin reasoning_parser_plugin io_processor_plugin "
        "logits_processors logits_processor_pattern worker_cls worker_extension_cls scheduler_cls"
    ): "no code beside the server's own is run",
    "enable_request_id_headers enable_server_load_tracking enable_prompt_tokens_details": (
        f"this is always on; {LEAVE_OUT}"
    ),
    "enable_force_include_usage": "requests ask for it with stream_options.include_usage",
    "return_tokens_as_token_ids": "requests ask for it with return_tokens_as_token_ids",
    "api_server_count disable_frontend_multiprocessing": f"one process serves HTTP; {LEAVE_OUT}",
    "shutdown_timeout": "use --grace_period",
    "enable_sleep_mode": "use --enable_repository_control, which unloads and loads the model",
    "enable_tokenizer_info_endpoint": f"there is /tokenize only; {LEAVE_OUT}",
    "tool_server": "models call functions that requests name; the server calls none",
    "log_error_stack": f"the log has what went wrong, answers do not; {LEAVE_OUT}",
    "h11_max_incomplete_event_size h11_max_header_count": "limit headers in a proxy in front",
    (
        "otlp_traces_endpoint collect_detailed_traces kv_cache_metrics "
        "show_hidden_metrics_for_version enable_mfu_metrics profiler_config "
        "enable_per_request_metrics fingerprint_mode fingerprint_value"
    ): f"/metrics and the vdiff object of answers tell all there is; {LEAVE_OUT}",
    # The model
    "tokenizer tokenizer_mode skip_tokenizer_init": (
        f"the tokenizer is the checkpoint's own; {LEAVE_OUT}"
    ),
    "hf_token": "set the environment variable HF_TOKEN",
    "download_dir": "set the environment variable HF_HOME",
    (
        "load_format model_loader_extra_config safetensors_load_strategy ignore_patterns "
        "use_tqdm_on_load pt_load_map_location max_parallel_loading_workers "
        "weight_transfer_config"
    ): f"weights are read from safetensors files, with a progress bar; {LEAVE_OUT}",
    "code_revision tokenizer_revision": "use --revision; code in a checkpoint is never run",
    "hf_overrides hf_config_path config_format rope_scaling rope_theta": (
        "edit the checkpoint's config.json"
    ),
    "task runner convert model_impl pooler_config override_pooler_config": (
        f"models only generate text; {LEAVE_OUT}"
    ),
    (
        "enable_lora lora_modules max_loras max_lora_rank max_cpu_loras lora_dtype "
        "lora_extra_vocab_size fully_sharded_loras default_mm_loras long_lora_scaling_factors "
        "enable_prompt_adapter qlora_adapter_name_or_path"
    ): "adapters are not served; merge one into the checkpoint",
    (
        "limit_mm_per_prompt enable_mm_embeds skip_mm_profiling interleave_mm_strings "
        "mm_processor_kwargs mm_processor_cache_gb mm_processor_cache_type "
        "disable_mm_preprocessor_cache mm_shm_cache_max_object_size_mb mm_encoder_tp_mode "
        "mm_encoder_attn_backend language_model_only allowed_local_media_path "
        "allowed_media_domains media_io_kwargs video_pruning_rate disable_chunked_mm_input "
        "enable_flash_late_interaction enable_multimodal_encoder_data_parallel ec_transfer_config"
    ): f"models read text only; {LEAVE_OUT}",
    "cpu_offload_gb": "use --device_map auto",
    # Requests
    "seed": "requests carry their own seed",
    "max_logprobs": f"requests may ask for 20; {LEAVE_OUT}",
    "logprobs_mode": f"they are of the model's logits at the moment of commit; {LEAVE_OUT}",
    "enable_prompt_embeds": f"prompts are texts or token ids; {LEAVE_OUT}",
    "stream_interval": f"a chunk has all that a step made final; {LEAVE_OUT}",
    "generation_config override_generation_config": (
        "name the defaults of requests as options, such as --temperature or --top_p"
    ),
    "chat_template_content_format response_role": f"messages are texts; {LEAVE_OUT}",
    "default_chat_template_kwargs": "requests carry their own chat_template_kwargs",
    "trust_request_chat_template": "chat templates come from the checkpoint or --chat_template",
    "exclude_tools_when_tool_choice_none": f"this is always so; {LEAVE_OUT}",
    "reasoning_parser enable_reasoning": f"models have no separate reasoning; {LEAVE_OUT}",
    (
        "structured_outputs_config guided_decoding_backend guided_decoding_disable_fallback "
        "guided_decoding_disable_any_whitespace guided_decoding_disable_additional_properties"
    ): f"grammars are always followed by llguidance; {LEAVE_OUT}",
    "speculative_config speculative_model num_speculative_tokens num_lookahead_slots": (
        "a pass writes several tokens already; --policy and --apd_model say which"
    ),
    "diffusion_config": "name the decoding as options, such as --policy or --diffusion_steps",
    # The engine
    (
        "enable_chunked_prefill max_num_partial_prefills max_long_partial_prefills "
        "long_prefill_token_threshold"
    ): (
        f"long prompts are always computed in parts, as --max_num_batched_tokens says; {LEAVE_OUT}"
    ),
    "swap_space preemption_mode kv_offloading_size kv_offloading_backend": (
        f"a request keeps its cache until it ends; {LEAVE_OUT}"
    ),
    "num_gpu_blocks_override kv_cache_memory_bytes": "use --kv_cache_memory",
    "kv_cache_dtype calculate_kv_scales": f"keys and values have the type --dtype; {LEAVE_OUT}",
    "kv_transfer_config kv_events_config": "keys and values are not moved between servers",
    (
        "prefix_caching_hash_algo scheduling_policy async_scheduling num_scheduler_steps "
        "attention_backend attention_config moe_backend kernel_config override_attention_dtype "
        "disable_sliding_window disable_cascade_attn disable_hybrid_kv_cache_manager "
        "use_v2_block_manager kv_sharing_fast_prefill mamba_cache_dtype mamba_ssm_cache_dtype "
        "mamba_block_size additional_config disable_async_output_proc tokenizer_pool_size "
        "performance_mode external_parameters"
    ): f"there is one way only; {LEAVE_OUT}",
    (
        "compilation_config cc optimization_level o max_seq_len_to_capture "
        "cudagraph_capture_sizes max_cudagraph_capture_size cuda_graph_sizes"
    ): f"--enforce_eager is the only choice; {LEAVE_OUT}",
    "tp": "use --tensor_parallel_size",
    "q": "use --quantization",
    (
        "dp data_parallel_size dpl data_parallel_size_local dpn data_parallel_rank dpr "
        "data_parallel_start_rank dpb data_parallel_backend dpa data_parallel_address dpp "
        "data_parallel_rpc_port data_parallel_hybrid_lb data_parallel_external_lb "
        "data_parallel_supervisor_port"
    ): "use --replicas",
    (
        "pp pipeline_parallel_size dcp decode_context_parallel_size prefill_context_parallel_size "
        "cp_kv_cache_interleave_size"
    ): "use --tensor_parallel_size, or --replicas",
    "nnodes node_rank master_addr master_port headless": "use --replicas with --ray_address",
    (
        "enable_expert_parallel ep all2all_backend expert_placement_strategy enable_eplb "
        "eplb_config enable_dbo dbo_decode_token_threshold dbo_prefill_token_threshold"
    ): f"experts are shared out by --tensor_parallel_size; {LEAVE_OUT}",
    (
        "distributed_executor_backend disable_custom_all_reduce ray_workers_use_nsight "
        "disable_nccl_for_dp_synchronization"
    ): f"--tensor_parallel_size and --replicas choose it; {LEAVE_OUT}",
}
HINTS = {name: hint for names, hint in _HINTS.items() for name in names.split()}
"""vLLM's option, with underscores -> what to do here."""


def hint_for(argument: str) -> str | None:
    """What to do about an argument that is vLLM's; None when it is not."""
    if argument == "serve":
        return "name the model by --model, without the word serve"
    name = plain(argument).lower().partition(".")[0]
    short = name.rstrip("0123456789")
    return HINTS.get(name) or HINTS.get(name.removeprefix("no_")) or HINTS.get(short)
