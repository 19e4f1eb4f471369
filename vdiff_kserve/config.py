"""Every setting of the server, once.

The fields of `ServerConfig` are the table: type, default, help, allowed values, flag and
environment variable. The command line, the checks and `docs/configuration.md`
(`python -m vdiff_kserve.config`) all come from it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from vdiff_kserve.command_line import (
    ENV_PREFIX,
    CommandLine,
    kserve_model_server,
    kserve_options,
    plain,
)
from vdiff_kserve.decoding import DECODING_FIELDS, PROFILES
from vdiff_kserve.setting import SIZE, ConfigError, Kind, Setting
from vdiff_kserve.vllm_options import VLLM_API_KEY, hint_for

DIFFUSION_FAMILIES = ("llada", "llada_moe", "llada2", "dream", "sdar", "sdar_moe", "fast_dllm_v2")
MODEL_SOURCES = ("model_dir", "model_id", "model", "dcp_path")
WORKERS_REASON = (
    "each further worker is a process that would need the whole model, and KServe cannot hand a "
    "loaded model to it. Requests are batched inside the one worker; for more, run more servers"
)
WITHOUT_EFFECT = "max_asyncio_workers"
"""An option that KServe itself, with one worker, reads and does not use."""


def _setting(kind: Kind, default: Any, **facts: Any) -> Any:
    setting = Setting(kind, default, **facts)
    return field(default=default, repr=not setting.secret, metadata={"setting": setting})


def _kserve_defaults() -> argparse.Namespace:
    return argparse.Namespace(**{a.dest: a.default for a in kserve_options(ALL_SETTINGS)})


@dataclass(frozen=True)
class ServerConfig:
    """A checked configuration.

    `decoding` holds the server's defaults for the decoding fields of a request, by field name, as
    far as they are given. `kserve` holds KServe's own flags (`grpc_port`, `enable_grpc`,
    `ssl_certfile`, ...) under the names that KServe gives them; `port` stands for KServe's
    `http_port`.

    Raises:
        ConfigError: a value out of range, or settings that contradict each other.
    """

    model_name: str = _setting(
        str,
        "llada",
        group="model",
        metavar="NAME",
        help="Name of the model in requests, paths and metrics. Paths of KServe's V1 and V2 cannot "
        "hold a slash: a name with one needs another without, by --served_model_name.",
    )
    served_model_name: tuple[str, ...] = _setting(
        str,
        (),
        group="model",
        metavar="NAME",
        many=True,
        default_text="none",
        help="Further names that requests may use for the model.",
    )
    model_dir: str | None = _setting(
        str,
        None,
        group="model",
        metavar="DIR",
        is_path=True,
        default_text="the embedded model",
        help="Folder of a checkpoint: config.json, tokenizer and safetensors files.",
    )
    model_id: str | None = _setting(
        str,
        None,
        group="model",
        metavar="ID",
        default_text="the embedded model",
        pattern=(r"\w[\w.-]*(/\w[\w.-]*)?", "a hub id such as GSAI-ML/LLaDA-8B-Instruct"),
        help="Checkpoint on the Hugging Face hub, downloaded at start.",
    )
    model: str | None = _setting(
        str,
        None,
        group="model",
        metavar="DIR_OR_ID",
        is_path=True,
        default_text="the embedded model",
        help="Either of the two: a folder when one of that name exists, else a hub id.",
    )
    diffusion_family: str | None = _setting(
        str,
        None,
        group="model",
        metavar="FAMILY",
        choices=DIFFUSION_FAMILIES,
        default_text="what config.json names",
        help="How the checkpoint is read and decoded, where its config.json names a plain causal "
        "class: Open-dCoder is dream.",
    )
    mask_token_id: int | None = _setting(
        int,
        None,
        group="model",
        metavar="ID",
        low=0,
        default_text="of config.json, else of the tokenizer, else of the family",
        help="The token that stands for a position not yet written.",
    )
    revision: str | None = _setting(
        str,
        None,
        group="model",
        metavar="REVISION",
        default_text="the main branch",
        help="Branch, tag or commit of a checkpoint, or of a base model, on the hub.",
    )
    dcp_path: str | None = _setting(
        str,
        None,
        group="model",
        metavar="DIR",
        is_path=True,
        default_text="the embedded model",
        help="PyTorch Distributed Checkpoint of a training run, such as NeMo-RL writes; converted "
        "at the first start.",
    )
    base_model: str | None = _setting(
        str,
        None,
        group="model",
        metavar="DIR_OR_ID",
        is_path=True,
        default_text="none",
        help="With --dcp_path: the model that was trained, for its configuration and tokenizer.",
    )
    cache_dir: str = _setting(
        str,
        "~/.cache/vdiff_kserve",
        group="model",
        metavar="DIR",
        is_path=True,
        help="Where converted checkpoints are kept. Downloads are kept below HF_HOME.",
    )
    chat_template: str | None = _setting(
        str,
        None,
        group="model",
        metavar="FILE",
        is_path=True,
        default_text="the checkpoint's own",
        help="Jinja file with the chat template.",
    )
    trust_remote_code: bool = _setting(
        bool,
        False,
        group="model",
        metavar="BOOL",
        help="Let a tokenizer that has neither tokenizer.json nor vocabulary files be made by the "
        "checkpoint's own code. Nothing else of a checkpoint is ever run, so that no model needs "
        "this.",
    )
    dtype: str = _setting(
        str,
        "auto",
        group="model",
        metavar="TYPE",
        choices=("auto", "bfloat16", "float16", "float32", "half", "float"),
        help="Number type of the weights and of the computation; auto is bfloat16 where the "
        "hardware multiplies it natively, else float32.",
    )
    quantization: str | None = _setting(
        str,
        None,
        group="model",
        metavar="KIND",
        choices=("int8", "fp8", "int4"),
        default_text="none",
        help="Keep the weights of the blocks in fewer bits; with fp8, their linear layers are also "
        "computed in fp8.",
    )
    device: str = _setting(
        str,
        "auto",
        group="model",
        metavar="DEVICE",
        pattern=(r"auto|cpu|cuda(:\d+)?", "auto, cpu, cuda or cuda:N"),
        help="Where the model runs; auto is the GPU when there is one.",
    )
    tensor_parallel_size: int = _setting(
        int,
        1,
        group="model",
        metavar="N",
        low=1,
        high=64,
        help="Devices of this machine that share the model, each with a part of every layer; on a "
        "CPU as many processes.",
    )
    device_map: str | None = _setting(
        str,
        None,
        group="model",
        metavar="MAP",
        pattern=(r"auto|balanced|cpu|cuda(:\d+)?", "auto, balanced, cpu, cuda or cuda:N"),
        default_text="all on --device",
        help="For a model that one GPU does not hold: auto keeps what does not fit on the next "
        "GPUs, then in host memory, balanced as much on every GPU; all is computed on the first, "
        "so that it is slow. A device's name is the same as --device.",
    )
    max_model_len: int | None = _setting(
        int,
        None,
        group="engine",
        metavar="N",
        low=2,
        default_text="what the checkpoint says",
        help="Most tokens of one request, prompt and answer together.",
    )
    max_num_seqs: int = _setting(
        int,
        8,
        group="engine",
        metavar="N",
        low=1,
        help="Most requests decoded at once.",
    )
    max_queue: int = _setting(
        int,
        256,
        group="engine",
        metavar="N",
        low=1,
        help="Most requests that wait; a further one is refused with status 429.",
    )
    max_num_batched_tokens: int | None = _setting(
        int,
        None,
        group="engine",
        metavar="N",
        low=1,
        default_text="measured at start, for a quarter of a second",
        help="Most tokens that one round spends on passes over whole canvases; a longer pass is "
        "spread over several rounds, so that other requests go on meanwhile.",
    )
    gpu_memory_utilization: float = _setting(
        float,
        0.9,
        group="engine",
        metavar="SHARE",
        low=0,
        high=1,
        low_open=True,
        help="Share of the GPU's memory that the server may use; what weights and scratch leave "
        "is for keys and values.",
    )
    cpu_memory_utilization: float = _setting(
        float,
        0.5,
        group="engine",
        metavar="SHARE",
        low=0,
        high=1,
        low_open=True,
        help="On a CPU, share of the memory that is free after loading which keys and values may "
        "take; ranks, and the replicas that a machine has room for, share it equally.",
    )
    kv_cache_memory: str | None = _setting(
        str,
        None,
        group="engine",
        metavar="SIZE",
        pattern=SIZE,
        default_text="what the two shares above leave",
        help="Memory for keys and values, of each rank and each replica.",
    )
    enforce_eager: bool = _setting(
        bool,
        False,
        group="engine",
        metavar="BOOL",
        help="Run cached passes on a GPU without CUDA graphs: slower, and without the memory and "
        "the first moments that captures take. A CPU has none.",
    )
    enable_prefix_caching: bool = _setting(
        bool,
        True,
        group="engine",
        metavar="BOOL",
        negation="no_enable_prefix_caching",
        help="Block-causal models keep the keys and values of finished requests for others whose "
        "prompts begin alike; with bidirectional models there is nothing to keep.",
    )
    request_timeout: float | None = _setting(
        float,
        None,
        group="engine",
        metavar="SECONDS",
        low=0.001,
        default_text="none",
        help="Longest time that a request may take, also one that names a longer timeout itself.",
    )
    round_timeout: float | None = _setting(
        float,
        None,
        group="engine",
        metavar="SECONDS",
        low=0,
        default_text="measured: ten times what rounds of its size take, 3 seconds at least, 60 "
        "where the size is new",
        help="Longest time that a round may take before the engine counts as stuck: its liveness "
        "probe fails, or the replica is replaced. 0 waits for ever.",
    )
    default_max_tokens: int = _setting(
        int,
        512,
        group="decoding",
        metavar="N",
        low=1,
        help="Answer length of a chat request that sets no max_tokens, and of a completion that "
        "sets it to null (16 where it names none); less where the context has less room.",
    )
    profile: str = _setting(
        str,
        "quality",
        group="decoding",
        metavar="PROFILE",
        choices=PROFILES,
        help="The model's own decoding that the options below change: exact decodes as its "
        "authors do, quality loses next to nothing, fast loses some.",
    )
    enable_apd: bool = _setting(
        bool,
        True,
        group="decoding",
        metavar="BOOL",
        negation="disable_apd",
        help="Adaptive parallel decoding: load its auxiliary model, if there is one, and allow "
        "policy apd.",
    )
    apd_model: str | None = _setting(
        str,
        None,
        group="decoding",
        metavar="DIR",
        is_path=True,
        default_text="the embedded one with the embedded model, else none",
        help="Folder of a causal checkpoint with the same vocabulary (Qwen2, Qwen3 or Llama "
        "format) that checks what policy apd proposes.",
    )
    decoding: Mapping[str, Any] = field(default_factory=dict)
    max_schema_bytes: int = _setting(
        int,
        2**16,
        group="decoding",
        metavar="N",
        low=1,
        help="Longest JSON schema, regular expression or grammar that a request may ask its answer "
        "to match.",
    )
    grammar_timeout: float = _setting(
        float,
        5.0,
        group="decoding",
        metavar="SECONDS",
        low=0.001,
        help="Longest time that compiling one may take; a request that needs more is refused.",
    )
    enable_auto_tool_choice: bool = _setting(
        bool,
        True,
        group="decoding",
        metavar="BOOL",
        negation="disable_auto_tool_choice",
        help="Let models choose themselves whether to call a function (tool_choice auto); else "
        "such requests are refused.",
    )
    tool_call_parser: str = _setting(
        str,
        "hermes",
        group="decoding",
        metavar="PARSER",
        choices=("hermes", "json"),
        help="How the model writes calls of functions: hermes is JSON between <tool_call> and "
        "</tool_call>, json is an answer that is a list of calls.",
    )
    tools_in_prompt: bool = _setting(
        bool,
        True,
        group="decoding",
        metavar="BOOL",
        negation="no_tools_in_prompt",
        help="Tell a model whose chat template takes no tools of them in the system message; else "
        "only the grammar of forced calls knows them.",
    )
    host: str = _setting(
        str,
        "0.0.0.0",
        group="server",
        metavar="ADDRESS",
        help="Address that HTTP listens on.",
    )
    port: int = _setting(
        int,
        8080,
        group="server",
        metavar="N",
        low=0,
        high=65535,
        aliases=("http_port",),
        help="Port that HTTP listens on; 0 takes a free one and prints it.",
    )
    api_key: tuple[str, ...] = _setting(
        str,
        (),
        group="server",
        metavar="KEY",
        many=True,
        secret=True,
        pattern=(r"[!-+\--~]+", "letters, digits and signs without spaces and commas"),
        default_text="none: everyone is let in",
        help="Keys of which requests must send one, in the header Authorization: Bearer KEY, over "
        "gRPC in the metadata. Other users of the machine see the command line: prefer the "
        "environment.",
    )
    rate_limit: tuple[str, ...] = _setting(
        str,
        (),
        group="server",
        metavar="RATE",
        many=True,
        pattern=(r"[1-9]\d{0,8}/(second|minute|hour|day)", "a rate such as 60/minute"),
        default_text="none",
        help="Most requests of one key, or of one address where there are no keys; several rates "
        "hold together. Further requests are refused with status 429.",
    )
    max_body_bytes: int = _setting(
        int,
        16 * 2**20,
        group="server",
        metavar="N",
        low=1,
        help="Longest body of a request; a longer one is refused with status 413. For gRPC there "
        "is --grpc_max_receive_message_length.",
    )
    allowed_origins: tuple[str, ...] = _setting(
        str,
        (),
        group="server",
        metavar="ORIGIN",
        many=True,
        pattern=(
            r"\*|[a-z][a-z0-9+.-]*://[^\s/,\"]+",
            "origins such as https://chat.example.org, or *",
        ),
        default_text="none",
        help="Web origins, such as https://chat.example.org, whose pages may call the server from "
        "a browser; * is all.",
    )
    enable_repository_control: bool = _setting(
        bool,
        False,
        group="server",
        metavar="BOOL",
        help="Let requests unload the model and load it again, by /v2/repository and gRPC; else "
        "they are refused with status 403.",
    )
    replicas: str | None = _setting(
        str,
        None,
        group="replicas",
        metavar="N or MIN:MAX",
        pattern=(r"[1-9]\d{0,3}(:[1-9]\d{0,3})?", "a number from 1 on, or two such as 1:4"),
        default_text="none: the engine runs in the server's own process",
        help="Engines that answer, each in a process of its own that Ray places on the machines it "
        "has; MIN:MAX follows the load. A lost one is replaced, and its requests run again.",
    )
    ray_address: str | None = _setting(
        str,
        None,
        group="replicas",
        metavar="ADDRESS",
        pattern=(r"auto|local|[\w.-]+:\d+|\[[\da-fA-F:]+\]:\d+", "auto, local or HOST:PORT"),
        default_text="a Ray of its own on this machine",
        help="Ray cluster for the replicas; auto is the one that this machine belongs to.",
    )
    ray_dashboard: bool = _setting(
        bool,
        False,
        group="replicas",
        metavar="BOOL",
        help="Start Ray's dashboard with a Ray of the server's own.",
    )
    replica_port: int = _setting(
        int,
        0,
        group="replicas",
        metavar="PORT",
        low=0,
        high=65535,
        help="Port where the replicas call the server, beside Ray's own; 0 is any that is free. "
        "Replicas of a Ray of the server's own call on the loopback address.",
    )
    replica_gpus: float | None = _setting(
        float,
        None,
        group="replicas",
        metavar="N",
        low=0,
        default_text="tensor_parallel_size where the cluster has GPUs, else 0",
        help="GPUs that each replica asks Ray for.",
    )
    replica_cpus: float = _setting(
        float,
        1.0,
        group="replicas",
        metavar="N",
        low=0,
        help="CPU cores that each replica asks Ray for; it computes with as many threads.",
    )
    replica_memory: str | None = _setting(
        str,
        None,
        group="replicas",
        metavar="SIZE",
        pattern=SIZE,
        default_text="none",
        help="Memory that each replica asks Ray for.",
    )
    replica_tokens: int | None = _setting(
        int,
        None,
        group="replicas",
        metavar="N",
        low=1,
        default_text="max_num_seqs answers of default_max_tokens",
        help="With MIN:MAX, tokens of unfinished answers for which there is one replica.",
    )
    enable_restart: bool = _setting(
        bool,
        False,
        group="replicas",
        metavar="BOOL",
        help="Let POST /admin/restart replace the replicas one after the other, as SIGHUP does.",
    )
    grace_period: int = _setting(
        int,
        30,
        group="server",
        metavar="SECONDS",
        low=0,
        help="How long running requests may go on after a signal to stop.",
    )
    log_level: str = _setting(
        str,
        "info",
        group="server",
        metavar="LEVEL",
        choices=("debug", "info", "warning", "error", "critical"),
        help="Least severity that is logged.",
    )
    log_format: str = _setting(
        str,
        "text",
        group="server",
        metavar="FORMAT",
        choices=("text", "json"),
        help="How lines of the log are written; json, one object each, goes to standard output.",
    )
    kserve: argparse.Namespace = field(default_factory=_kserve_defaults)

    def __post_init__(self) -> None:
        for name, setting in SETTINGS.items():
            value = getattr(self, name)
            if value is None and setting.default is None:
                continue
            for each in value if setting.many else (value,):
                if problem := setting.problem(each):
                    raise ConfigError(f"--{name} {problem}")
        self._check_decoding()
        self._check_sources()
        self._check_replicas()
        if self.kserve.workers != 1:
            raise ConfigError(f"--workers must be 1, got {self.kserve.workers}: {WORKERS_REASON}")

    def _check_replicas(self) -> None:
        if self.replicas is None:
            for name in ("ray_address", "ray_dashboard", "enable_restart"):
                if getattr(self, name):
                    raise ConfigError(f"--{name} needs --replicas")
            return
        low, _, high = self.replicas.partition(":")
        if high and int(low) > int(high):
            raise ConfigError(f"--replicas must have its smaller number first, got {self.replicas}")
        if self.device.startswith("cuda:"):
            raise ConfigError(
                f"--device must be auto, cpu or cuda with --replicas, got {self.device}: Ray "
                "chooses each replica's GPU"
            )

    def _check_decoding(self) -> None:
        for name, value in self.decoding.items():
            if problem := DECODING_FIELDS[name].setting.problem(value):
                raise ConfigError(f"--{DECODING_FIELDS[name].flag or name} {problem}")
        if self.apd_model and not self.enable_apd:
            raise ConfigError("--apd_model and --disable_apd contradict each other")
        self._check_folder("apd_model")

    def _check_sources(self) -> None:
        if len(given := [name for name in MODEL_SOURCES if getattr(self, name)]) > 1:
            flags = " and ".join(f"--{name}" for name in given)
            raise ConfigError(f"{flags} contradict each other; give one of them")
        self._check_folder("model_dir")
        if (self.dcp_path is None) != (self.base_model is None):
            raise ConfigError("--dcp_path and --base_model need each other; give both")
        self._check_folder("dcp_path")
        hub = SETTINGS["model_id"]
        self._check_folder("base_model", hub)
        self._check_placement()
        if self.quantization and self.tensor_parallel_size > 1:
            raise ConfigError("--quantization and --tensor_parallel_size contradict each other")
        if self.revision and self.hub_id is None and self.base_model is None:
            raise ConfigError("--revision is for --model_id, --model and --base_model")
        self._check_folder("model", hub)

    def _check_folder(self, name: str, hub: Setting | None = None) -> None:
        """Refuse what is no folder, nor a hub id where one is allowed too."""
        given = getattr(self, name)
        if not given or Path(given).is_dir():
            return
        is_file = Path(given).is_file()
        if hub is not None and not is_file and not hub.problem(given):
            return
        allowed = f" or {hub.allowed}" if hub else ""
        told = f"{given!r}, which is a file" if is_file else repr(given)
        raise ConfigError(f"--{name} must be a folder that exists{allowed}, got {told}")

    def _check_placement(self) -> None:
        if self.device_map is None:
            return
        if self.device != "auto":
            raise ConfigError("--device_map and --device contradict each other; give one of them")
        if self.tensor_parallel_size > 1:
            raise ConfigError("--device_map and --tensor_parallel_size contradict each other")
        if self.replicas is not None:
            raise ConfigError("--device_map and --replicas contradict each other")
        if self.quantization and self.device_map in ("auto", "balanced"):
            raise ConfigError(f"--device_map {self.device_map} and --quantization contradict")

    @property
    def checkpoint_dir(self) -> Path | None:
        """Folder of the checkpoint; None when it is embedded or on the hub."""
        if self.model_dir:
            return Path(self.model_dir)
        return Path(self.model) if self.model and Path(self.model).is_dir() else None

    @property
    def hub_id(self) -> str | None:
        """Hub id of the checkpoint; None when it is embedded or a folder."""
        return self.model_id or (self.model if self.checkpoint_dir is None else None)

    @property
    def served_names(self) -> tuple[str, ...]:
        """Every name a request may use, `model_name` first."""
        return tuple(dict.fromkeys((self.model_name, *self.served_model_name)))

    def apply_to_kserve(self) -> None:
        """Let `kserve.model_server` see these settings.

        KServe reads `sys.argv` when it is imported and uses what it found there for its logging,
        its gRPC limits and its `/docs` page. Call this before `ModelServer` is made.
        """
        server = kserve_model_server()
        vars(server.args).update(vars(self.kserve), http_port=self.port, model_name=self.model_name)
        if self.kserve.enable_docs_url and server.app.docs_url is None:
            server.app.docs_url = "/docs"
            server.app.setup()


SETTINGS: dict[str, Setting] = {
    f.name: f.metadata["setting"] for f in fields(ServerConfig) if "setting" in f.metadata
}
DECODING_FLAGS = {field.flag or name: name for name, field in DECODING_FIELDS.items()}
"""Flag -> request field."""
ALL_SETTINGS: dict[str, Setting] = SETTINGS | {
    flag: replace(DECODING_FIELDS[name].setting, aliases=() if flag == name else (name,))
    for flag, name in DECODING_FLAGS.items()
}
GROUPS = {
    "model": "model",
    "engine": "engine",
    "decoding": "decoding (defaults for requests that do not say)",
    "server": "server",
    "replicas": "replicas",
}


def parse_args(
    argv: Sequence[str] | None = None, environ: Mapping[str, str] | None = None
) -> ServerConfig:
    """The configuration of a command line; the process exits with a message when it is wrong.

    Args:
        argv: arguments without the program's name; None takes the process's own.
        environ: environment variables; None takes the process's own.
    """
    command_line = CommandLine(ALL_SETTINGS, GROUPS, exclusive=MODEL_SOURCES, hint_for=hint_for)
    environ = os.environ if environ is None else environ
    values = command_line.read(sys.argv[1:] if argv is None else argv, environ)
    for warning in command_line.unknown_variables(environ):
        sys.stderr.write(f"warning: {warning}\n")
    if environ.get(VLLM_API_KEY) and not values.get("api_key"):
        command_line.error(
            f"{VLLM_API_KEY} is set, which only vLLM reads, so that everyone would be let in; set "
            f"{ENV_PREFIX}API_KEY, or remove it"
        )
    kserve = _kserve_defaults()
    vars(kserve).update((k, v) for k, v in values.items() if k not in ALL_SETTINGS)
    ours: dict[str, Any] = {
        name: tuple(values[name]) if setting.many else values[name]
        for name, setting in SETTINGS.items()
        if name in values
    }
    decoding = {name: values[flag] for flag, name in DECODING_FLAGS.items() if flag in values}
    try:
        return ServerConfig(**ours, decoding=decoding, kserve=kserve)
    except ConfigError as error:
        command_line.error(str(error))


def render_docs() -> str:
    """The text of `docs/configuration.md`."""
    lines = [
        "# Configuration",
        "",
        "Made from `vdiff_kserve/config.py` by `make docs`; edit there.",
        "",
        "Every option can be written with dashes or underscores and set by an environment",
        f"variable, `{ENV_PREFIX}` and its name in capitals. The command line wins over the",
        "environment, the environment over the default. An empty variable counts as absent.",
        "",
    ]
    for group, title in GROUPS.items():
        lines += [f"## {title[0].upper()}{title[1:]}", ""]
        lines += ["| option | variable | allowed | default | meaning |", "|---|---|---|---|---|"]
        for name, setting in ALL_SETTINGS.items():
            if setting.group == group:
                negation = (setting.negation,) if setting.negation else ()
                names = (name, *setting.aliases, *negation)
                flags = ", ".join(f"`--{each}`" for each in names)
                variables = ", ".join(f"`{ENV_PREFIX}{each.upper()}`" for each in names)
                allowed = setting.allowed or ("any texts" if setting.many else "any text")
                default = setting.default_text or f"`{setting.default}`"
                lines.append(f"| {flags} | {variables} | {allowed} | {default} | {setting.help} |")
        lines.append("")
    lines += ["## KServe's own", ""]
    lines += ["| option | variable | default | meaning |", "|---|---|---|---|"]
    for action in kserve_options(ALL_SETTINGS):
        flag = action.option_strings[0]
        variable = f"`{ENV_PREFIX}{plain(flag).upper()}`"
        default = "none" if action.default is None else f"`{action.default}`"
        lines.append(f"| `{flag}` | {variable} | {default} | {action.help} |")
    lines += ["", f"`--workers` must stay 1: {WORKERS_REASON}."]
    lines += [
        "",
        f"`--{WITHOUT_EFFECT}` changes nothing, here as in KServe itself with one worker, nor do "
        "the options of predictors: those are for programs that call a server like this.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(render_docs(), end="")
