"""The command line, the environment and the checks of a configuration."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vdiff_kserve import __version__
from vdiff_kserve.command_line import ELSEWHERE
from vdiff_kserve.config import (
    ALL_SETTINGS,
    DECODING_FLAGS,
    SETTINGS,
    WITHOUT_EFFECT,
    ConfigError,
    ServerConfig,
    kserve_model_server,
    kserve_options,
    parse_args,
    render_docs,
)
from vdiff_kserve.decoding import DECODING_FIELDS
from vdiff_kserve.models.precision import DTYPES
from vdiff_kserve.setting import SHORT_NAMES, parse_size
from vdiff_kserve.vllm_options import HINTS

ROOT = Path(__file__).parent.parent


def parse(*argv: str, **environ: str) -> ServerConfig:
    return parse_args(argv, environ)


def refusal(capsys: pytest.CaptureFixture[str], *argv: str, **environ: str) -> str:
    """The message with which a command line is refused."""
    with pytest.raises(SystemExit) as stop:
        parse(*argv, **environ)
    assert stop.value.code == 2
    return capsys.readouterr().err.rpartition("error: ")[2].strip()


def test_no_arguments_give_the_defaults_of_the_table():
    config = parse()
    for name, setting in SETTINGS.items():
        assert getattr(config, name) == setting.default
    assert config == ServerConfig()
    assert config.checkpoint_dir is None
    assert config.hub_id is None
    assert config.kserve.grpc_port == 8081


@pytest.mark.parametrize("form", ["--max_queue", "--max-queue", "--max-queue={}", "--max_queue={}"])
def test_a_flag_may_be_spelled_with_dashes_or_underscores(form):
    argv = [form.format(7)] if "{}" in form else [form, "7"]
    assert parse(*argv).max_queue == 7


@pytest.mark.parametrize("flag", ["--event-loop", "--event_loop"])
def test_flags_of_kserve_may_be_spelled_both_ways_too(flag):
    assert parse(flag, "asyncio").kserve.event_loop == "asyncio"


def test_every_option_of_kserve_is_an_option_here():
    config = parse()
    for action in kserve_model_server().parser._actions:
        if action.dest not in ("http_port", "model_name"):
            assert hasattr(config.kserve, action.dest)


def test_the_option_table_of_kserve_itself_is_not_changed():
    defaults = {a.dest: a.default for a in kserve_model_server().parser._actions}
    assert defaults["http_port"] == 8080
    assert defaults["model_name"] == "model"
    assert argparse.SUPPRESS not in defaults.values()


def test_the_last_flag_given_wins():
    assert parse("--port", "1", "--port", "2").port == 2


@pytest.mark.parametrize("flag", ["--diffusion_steps", "--steps"])
def test_decoding_default_has_the_name_of_the_request_field_too(flag: str) -> None:
    config = parse_args([flag, "7", "--block-length", "16"], {})
    assert config.decoding["steps"] == 7
    assert config.decoding["block_length"] == 16


@pytest.mark.parametrize("flag", ["--port", "--http_port", "--http-port"])
def test_the_port_has_the_name_of_kserve_too(flag):
    assert parse(flag, "0").port == 0


def test_the_environment_sets_what_the_command_line_does_not():
    config = parse("--max_queue", "5", VDIFF_MAX_QUEUE="6", VDIFF_MAX_NUM_SEQS="7")
    assert (config.max_queue, config.max_num_seqs) == (5, 7)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_is_read_from_its_environment_variable(name, tmp_path):
    values = {int: "3", float: "0.25", str: "text"}
    special = {"model_dir": str(tmp_path), "dtype": "float16", "device": "cuda:1"}
    special |= {
        "log_level": "debug",
        "log_format": "json",
        "profile": "fast",
        "apd_model": str(tmp_path),
    }
    special |= {"enforce_eager": "true"}
    special |= {"enable_repository_control": "true", "diffusion_family": "dream"}
    special |= {"kv_cache_memory": "3GiB", "rate_limit": "3/hour", "allowed_origins": "http://a"}
    special |= {"quantization": "int8", "device_map": "auto"}
    special |= {"trust_remote_code": "true", "tool_call_parser": "json"}
    special |= {"replica_memory": "3GiB", "replicas": "1:4", "dcp_path": str(tmp_path)}
    of_replicas = {"ray_address": "auto", "ray_dashboard": "true", "enable_restart": "true"}
    special |= of_replicas
    others = {"VDIFF_REPLICAS": "2"} if name in of_replicas else {}
    others |= {"revision": {"VDIFF_MODEL_ID": "a/b"}}.get(name, {})
    others |= {"dcp_path": {"VDIFF_BASE_MODEL": "a/b"}}.get(name, {})
    others |= {"base_model": {"VDIFF_DCP_PATH": str(tmp_path)}}.get(name, {})
    values[bool] = "false"
    text = special.get(name, values[SETTINGS[name].kind])
    value = getattr(parse(**others, **{f"VDIFF_{name.upper()}": text}), name)
    assert value == ((text,) if SETTINGS[name].many else SETTINGS[name].parse(text))
    assert value != SETTINGS[name].default


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--replicas", "0"], "--replicas: must be a number"),
        (["--replicas", "4:2"], "smaller number first"),
        (["--replicas", "2", "--device", "cuda:1"], "--device must be auto, cpu or cuda"),
        (["--ray_address", "auto"], "--ray_address needs --replicas"),
        (["--enable_restart", "true"], "--enable_restart needs --replicas"),
    ],
)
def test_options_of_replicas_that_cannot_be_are_refused(argv, named, capsys):
    with pytest.raises(SystemExit):
        parse(*argv)
    assert named in capsys.readouterr().err


@pytest.mark.parametrize("flag", DECODING_FLAGS)
def test_every_decoding_field_of_a_request_has_a_flag_for_its_default(flag):
    name = DECODING_FLAGS[flag]
    setting = DECODING_FIELDS[name].setting
    text = setting.choices[0] if setting.choices else "1"
    assert parse(f"--{flag}", text).decoding == {name: setting.kind(text)}
    assert parse(**{f"VDIFF_{flag.upper()}": text}).decoding == {name: setting.kind(text)}


@pytest.mark.parametrize(
    ("argv", "enabled"),
    [
        ([], True),
        (["--enable_apd"], True),
        (["--enable-apd", "false"], False),
        (["--disable_apd"], False),
        (["--disable-apd", "--enable_apd"], True),
    ],
)
def test_apd_is_on_unless_it_is_switched_off(argv, enabled):
    assert parse(*argv).enable_apd is enabled


def test_the_switch_of_apd_has_a_variable_for_either_name():
    assert parse(VDIFF_DISABLE_APD="true").enable_apd is False
    assert parse(VDIFF_ENABLE_APD="no").enable_apd is False
    assert parse(VDIFF_DISABLE_APD="false").enable_apd is True


@pytest.mark.parametrize(
    ("variable", "text", "name", "value"),
    [
        ("VDIFF_GRPC_PORT", "9", "grpc_port", 9),
        ("VDIFF_ENABLE_GRPC", "false", "enable_grpc", False),
        ("VDIFF_EVENT_LOOP", "asyncio", "event_loop", "asyncio"),
        ("VDIFF_ENABLE_PREDICTOR_HEALTH_CHECK", "true", "enable_predictor_health_check", True),
        ("VDIFF_ENABLE_PREDICTOR_HEALTH_CHECK", "no", "enable_predictor_health_check", False),
    ],
)
def test_options_of_kserve_are_read_from_the_environment(variable, text, name, value):
    assert getattr(parse(**{variable: text}).kserve, name) == value


def test_an_empty_variable_counts_as_absent():
    assert parse(VDIFF_MAX_QUEUE="", VDIFF_TEMPERATURE=" ") == ServerConfig()


def test_the_variables_kubernetes_makes_for_a_service_named_vdiff_are_not_settings():
    environ = {"VDIFF_PORT": "tcp://10.0.0.7:80", "VDIFF_SERVICE_HOST": "10.0.0.7"}
    assert parse(**environ).port == 8080


def test_a_wrong_variable_is_not_read_when_the_command_line_has_the_setting():
    assert parse("--port", "80", VDIFF_PORT="abc").port == 80


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--rate_limit 60", "--rate_limit: must be a rate such as 60/minute, got '60'"),
        ("--rate_limit 5/second 0/hour", "must be a rate such as 60/minute, got '0/hour'"),
        ("--max_body_bytes 0", "--max_body_bytes: must be an integer of at least 1, got 0"),
    ],
)
def test_a_wrong_guard_is_refused(capsys, argv, said):
    assert said in refusal(capsys, *argv.split())


@pytest.mark.parametrize("separator", [" ", ",", ", "])
def test_a_variable_may_hold_several_names(separator):
    config = parse(VDIFF_SERVED_MODEL_NAME=separator.join(["a", "b"]))
    assert config.served_model_name == ("a", "b")


def test_served_names_start_with_the_model_name_and_have_no_doubles():
    config = parse("--model_name", "a", "--served_model_name", "b", "a", "c")
    assert config.served_names == ("a", "b", "c")


def test_the_model_option_is_a_folder_when_one_exists_else_a_hub_id(tmp_path):
    folder = parse("--model", str(tmp_path))
    assert (folder.checkpoint_dir, folder.hub_id) == (tmp_path, None)
    hub = parse("--model", "GSAI-ML/LLaDA-8B-Instruct")
    assert (hub.checkpoint_dir, hub.hub_id) == (None, "GSAI-ML/LLaDA-8B-Instruct")


def test_model_dir_and_model_id_name_the_checkpoint(tmp_path):
    assert parse("--model_dir", str(tmp_path)).checkpoint_dir == tmp_path
    assert parse("--model_id", "a/b").hub_id == "a/b"


def test_a_model_on_the_command_line_overrules_another_kind_in_the_environment(tmp_path):
    config = parse("--model_id", "a/b", VDIFF_MODEL_DIR=str(tmp_path))
    assert (config.hub_id, config.model_dir) == ("a/b", None)


def test_two_models_contradict_each_other(capsys):
    message = refusal(capsys, "--model_id", "a/b", "--model", "c/d")
    assert message == "--model_id and --model contradict each other; give one of them"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--port abc", "--port/--http_port: must be an integer from 0 to 65535, got 'abc'"),
        ("--port 65536", "--port/--http_port: must be an integer from 0 to 65535, got 65536"),
        ("--port -1", "--port/--http_port: must be an integer from 0 to 65535, got -1"),
        ("--max_queue 1.5", "--max_queue: must be an integer of at least 1, got '1.5'"),
        ("--max_model_len 1", "--max_model_len: must be an integer of at least 2, got 1"),
        ("--threshold 0", "--threshold: must be a number above 0 and at most 1, got 0.0"),
        ("--threshold 1.01", "--threshold: must be a number above 0 and at most 1, got 1.01"),
        ("--temperature nan", "--temperature: must be a number from 0 to 2, got nan"),
        ("--temperature 2.5", "--temperature: must be a number from 0 to 2, got 2.5"),
        ("--dtype fp8", "--dtype: must be one of auto, bfloat16, float16, float32, half, float"),
        ("--device gpu", "--device: must be auto, cpu, cuda or cuda:N, got 'gpu'"),
        ("--quantization int2", "--quantization: must be one of int8, fp8, int4, got 'int2'"),
        ("--quantization int8 --tensor_parallel_size 2", "contradict each other"),
        ("--device_map auto --device cpu", "contradict each other; give one of them"),
        ("--device_map auto --tensor_parallel_size 2", "contradict each other"),
        ("--device_map auto --quantization int8", "contradict"),
        ("--device_map gpu", "must be auto, balanced, cpu, cuda or cuda:N"),
        ("--revision v1", "--revision is for --model_id, --model and --base_model"),
        ("--base_model a/b", "--dcp_path and --base_model need each other; give both"),
        ("--dcp_path . --base_model a/b/c", "must be a folder that exists or a hub id"),
        ("--dcp_path /no/such --base_model a/b", "--dcp_path must be a folder that exists"),
        ("--model_id a/b/c", "--model_id: must be a hub id such as GSAI-ML/LLaDA-8B-Instruct"),
        ("--model ./none", "--model must be a folder that exists or a hub id such as"),
        ("--model_dir /none", "--model_dir must be a folder that exists, got '/none'"),
        ("--model_name=", "--model_name: must be a non-empty text, got ''"),
        ("--max_queue", "--max_queue: expected one argument"),
        ("--enable_grpc maybe", "--enable_grpc: must be true or false, got 'maybe'"),
        ("--workers 2", "--workers must be 1, got 2: each further worker is a process"),
    ],
)
def test_a_wrong_value_is_refused_with_its_flag_and_what_is_allowed(capsys, argv, message):
    assert message in refusal(capsys, *argv.split())


@pytest.mark.parametrize(
    ("variable", "text"),
    [("VDIFF_PORT", "abc"), ("VDIFF_ENABLE_PREDICTOR_HEALTH_CHECK", "maybe")],
)
def test_a_wrong_value_from_the_environment_names_the_variable(capsys, variable, text):
    message = refusal(capsys, **{variable: text})
    assert message.endswith(f"got '{text}' (from the environment variable {variable})")


def test_a_variable_that_is_of_no_option_is_told(capsys):
    parse(VDIFF_MAX_QEUE="3", VDIFF_GOLDEN_DIR="of tests", VDIFF_MAX_QUEUE="4")
    assert capsys.readouterr().err.splitlines() == [
        "warning: the environment variable VDIFF_MAX_QEUE is of no option; did you mean "
        "VDIFF_MAX_QUEUE?",
    ]


def test_variables_that_kubernetes_makes_of_services_are_passed_over(capsys):
    address = "tcp://10.0.0.1:80"
    of_services = {
        "VDIFF_PORT": address, "VDIFF_SERVICE_HOST": "10.0.0.1", "VDIFF_SERVICE_PORT": "80",
        "VDIFF_LLADA_SERVICE_PORT_HTTP": "80", "VDIFF_LLADA_PORT": address,
        "VDIFF_LLADA_PORT_80_TCP": address, "VDIFF_LLADA_PORT_80_TCP_PROTO": "tcp",
        "VDIFF_LLADA_PORT_80_TCP_PORT": "80", "VDIFF_LLADA_PORT_80_TCP_ADDR": "10.0.0.1",
    }  # fmt: skip
    parse(**of_services)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--max_que 3", "unknown option --max_que; did you mean --max_queue?"),
        ("--diffusion-step=3", "unknown option --diffusion-step; did you mean --diffusion_steps?"),
        ("--grpc-prt 3", "unknown option --grpc-prt; did you mean --grpc_port?"),
        ("--xyzzy", "unknown option --xyzzy; see --help"),
        ("--model-path x", "unknown option --model-path; did you mean --model_dir?"),
        ("--gpu_memory 3", "unknown option --gpu_memory; did you mean --gpu_memory_utilization?"),
        ("--verbose", "unknown option --verbose; did you mean --log_level?"),
        ("model", "unknown argument model; did you mean --model?"),
        ("org/LLaDA-8B", "unknown argument org/LLaDA-8B; a model is named by --model"),
    ],
)
def test_an_unknown_flag_is_refused_with_a_suggestion(capsys, argv, message):
    assert refusal(capsys, *argv.split()) == message


def test_names_of_other_programs_stand_for_options_that_there_are() -> None:
    assert set(ELSEWHERE.values()) <= set(ALL_SETTINGS)
    assert not set(ELSEWHERE) & (set(ALL_SETTINGS) | set(HINTS))


@pytest.mark.parametrize(("short", "meant"), SHORT_NAMES.items())
def test_a_short_name_of_a_number_type_is_refused_with_the_long_one(capsys, short, meant):
    message = refusal(capsys, "--dtype", short)
    assert message.endswith(f", got '{short}'; did you mean {meant}?")


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--version", VDIFF_VERSION="3")
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"vdiff_kserve {__version__}\n"
    assert parse(VDIFF_VERSION="3") == ServerConfig()


@pytest.mark.parametrize("name", ["model_dir", "model", "apd_model"])
def test_a_file_in_the_place_of_a_folder_is_told_so(capsys, tmp_path, name):
    file = tmp_path / "model.safetensors"
    file.touch()
    message = refusal(capsys, f"--{name}", str(file))
    assert message.startswith(f"--{name} must be a folder that exists")
    assert message.endswith(f", got '{file}', which is a file")


@pytest.mark.parametrize("name", ["model_dir", "model", "apd_model"])
def test_the_home_folder_may_be_written_short(monkeypatch, tmp_path, name):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    assert getattr(parse(f"--{name}", "~/models"), name) == str(tmp_path / "models")
    given = {f"VDIFF_{name.upper()}": "~/models"}
    assert getattr(parse(**given), name) == str(tmp_path / "models")


@pytest.mark.parametrize(
    ("argv", "option", "todo"),
    [
        ("serve org/x", "serve", "name the model by --model"),
        ("--swap-space 4", "--swap-space", "leave it out"),
        ("--no-enable-chunked-prefill", "--no-enable-chunked-prefill", "--max_num_batched_tokens"),
        ("--data-parallel-size=2", "--data-parallel-size", "use --replicas"),
        ("-tp 2", "-tp", "use --tensor_parallel_size"),
        ("-O3", "-O3", "--enforce_eager"),
    ],
)
def test_an_option_of_vllm_is_refused_with_what_to_do(capsys, argv, option, todo):
    message = refusal(capsys, *argv.split())
    assert message.startswith(f"vLLM's {'option' if option[0] == '-' else 'argument'} {option}: ")
    assert todo in message


def test_all_options_of_a_command_line_for_vllm_are_answered_at_once(capsys):
    argv = "serve org/x --swap-space 4 --seed=0 --max-num-seqs 16 --uvicorn-log-level info -tp 2"
    with pytest.raises(SystemExit):
        parse(*argv.split())
    told = capsys.readouterr().err
    for name in ("serve", "--swap-space", "--seed", "--uvicorn-log-level", "-tp"):
        assert f" {name}: " in told
    assert "max-num-seqs" not in told
    assert "did you mean" not in told
    assert "--help" not in told


def test_what_is_said_about_options_of_vllm_is_true():
    """They do not exist here, and those that are named instead do."""
    kserve = {each for action in kserve_options(ALL_SETTINGS) for each in action.option_strings}
    known = {f"--{name}" for name in ALL_SETTINGS} | kserve
    for name, hint in HINTS.items():
        assert f"--{name}" not in known
        assert set(re.findall(r"--\w+", hint)) <= known, name


@pytest.mark.parametrize("origin", ['["*"]', "chat.example.org", "https://a.example/path"])
def test_an_origin_is_a_scheme_and_a_host(capsys, origin):
    assert "--allowed_origins: must be origins such as" in refusal(
        capsys, "--allowed_origins", origin
    )


@pytest.mark.parametrize("value", [0, True, 2.0, "3"])
def test_a_configuration_made_in_code_is_checked_too(value):
    with pytest.raises(ConfigError, match="--max_queue must be an integer of at least 1"):
        ServerConfig(max_queue=value)


KEYS = {
    "--api_key good, sk-1": "--api_key: must be letters, digits and signs",
    "--api_key sk-1 -sk-2": "an argument is unknown; it may be a secret",
    "--api_key=good --swap-space 4 -sk-1": "vLLM's option --swap-space: ",
    "--api_key=good sk-1": "an argument is unknown; it may be a secret",
    "--api_kei=sk-1": "unknown option --api_kei; did you mean --api_key?",
    "--api_key sk-1 --port sk": "--port/--http_port: must be an integer",
}


@pytest.mark.parametrize("argv", KEYS)
def test_a_key_is_never_shown_when_the_command_line_is_refused(capsys, argv):
    with pytest.raises(SystemExit):
        parse(*argv.split())
    said = capsys.readouterr()
    assert KEYS[argv] in said.err
    assert "sk-" not in said.err + said.out


@pytest.mark.parametrize("text", ["sk-1 -sk-2", "sk-ü", "sk-1 --port sk-2"])
def test_a_key_of_the_environment_is_never_shown(capsys, text):
    try:
        config = parse(VDIFF_API_KEY=text)
    except SystemExit:
        assert "VDIFF_API_KEY" in (said := capsys.readouterr().err)
        assert "sk-" not in said
    else:
        assert config.api_key == tuple(text.split())
        assert "sk-" not in repr(config)


def test_a_server_that_was_closed_under_vllm_does_not_become_open(capsys):
    message = refusal(capsys, VLLM_API_KEY="sk-1")
    assert "VDIFF_API_KEY" in message
    assert "sk-1" not in message
    assert parse(VLLM_API_KEY="sk-1", VDIFF_API_KEY="sk-2").api_key == ("sk-2",)
    assert parse(VLLM_API_KEY="").api_key == ()


def test_help_does_not_show_the_keys_of_the_environment(capsys):
    with pytest.raises(SystemExit):
        parse("--help", VDIFF_API_KEY="sk-1")
    assert "sk-1" not in capsys.readouterr().out


def test_names_of_number_types_are_those_the_models_know():
    assert set(SETTINGS["dtype"].choices) == {"auto", *DTYPES}


def test_help_lists_the_settings_before_the_options_of_kserve(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    positions = [text.index(f"--{name}") for name in SETTINGS]
    assert max(positions) < text.index("KServe's options") < text.index("--grpc_port")
    assert "docs/configuration.md" in text


def test_options_of_transformers_are_read_but_not_in_the_help(capsys):
    assert parse("--protocol", "v2").kserve.protocol == "v2"
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    assert "--predictor_" not in text
    assert "--protocol" not in text


def test_every_option_of_kserve_is_used_or_said_not_to_be():
    files = (ROOT / "vdiff_kserve").rglob("*.py")
    sources = "".join(file.read_text(encoding="utf-8") for file in files)
    for action in kserve_options(ALL_SETTINGS):
        name = action.dest
        idle = name in ("protocol", WITHOUT_EFFECT) or "predictor" in name
        limit = name.startswith("grpc_max") and f'"{name.removeprefix("grpc_")}"' in sources
        used = limit or re.search(rf"\b(options|kserve)\.{name}\b", sources)
        assert used or idle, name


def test_kserve_is_told_of_its_options(monkeypatch):
    server = kserve_model_server()
    monkeypatch.setattr(server, "args", argparse.Namespace(**vars(server.args)))
    parse("--grpc_port", "9", "--port", "10", "--model_name", "m").apply_to_kserve()
    assert (server.args.grpc_port, server.args.http_port) == (9, 10)
    assert server.args.model_name == "m"


def test_kserve_does_not_read_the_command_line_of_the_process():
    code = (
        "from vdiff_kserve.config import parse_args; import sys; c = parse_args();"
        "c.apply_to_kserve(); import kserve.model_server as s;"
        "print(s.args.grpc_port, s.app.docs_url, '/docs' in [r.path for r in s.app.routes])"
    )
    argv = [sys.executable, "-c", code, "--grpc-port", "9", "--enable-docs-url", "true"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == ["9", "/docs", "True"]


def test_a_wrong_option_of_kserve_is_refused_here_and_not_while_kserve_is_imported():
    code = "from vdiff_kserve.config import parse_args; parse_args()"
    argv = [sys.executable, "-c", code, "--grpc_port", "abc"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: python -m vdiff_kserve ")


def test_the_configuration_page_is_current():
    page = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    heading = "## KServe's own"
    assert page.partition(heading)[0] == render_docs().partition(heading)[0], "run `make docs`"
    for option in kserve_options(SETTINGS):
        assert f"`{option.option_strings[0]}`" in page, "run `make docs`"
    assert "| `--grpc_port` | `VDIFF_GRPC_PORT` | `8081` |" in page
    assert "| `--enable_grpc` | `VDIFF_ENABLE_GRPC` | `True` |" in page


@pytest.mark.parametrize(
    ("text", "size"),
    [("1B", 1), ("2KB", 2000), ("2KiB", 2048), ("1.5MiB", 3 << 19), ("4 GiB", 4 << 30)],
)
def test_sizes_are_read_with_their_units(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "4", "GiB", "4gb", "-1GiB", "4GiB!"])
def test_texts_that_are_no_sizes_are_refused(text):
    with pytest.raises(ValueError, match="such as 512MiB"):
        parse_size(text)
