"""From a table of settings to values: the command line, then the environment.

KServe's own options are read from KServe's parser and treated like this project's.
"""

from __future__ import annotations

import argparse
import copy
import difflib
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NoReturn

from vdiff_kserve import __version__
from vdiff_kserve.setting import Setting, parse_bool

ENV_PREFIX = "VDIFF_"
SERVICE_LINK = re.compile(r"(tcp|udp|sctp)://")
"""Kubernetes sets VDIFF_PORT=tcp://... in every pod beside a Service named "vdiff"."""
SERVICE_VARIABLE = re.compile(
    r".*_SERVICE_(HOST|PORT(_\w+)?)|.*_PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?"
)
"""And these, for every Service whose name begins with it."""


_ELSEWHERE = {
    "model_dir": "model_path path checkpoint checkpoint_dir checkpoint_path ckpt ckpt_dir",
    "model_id": "hf_model repo_id hub_id",
    "log_level": "verbose verbosity debug quiet",
    "host": "bind address ip listen",
    "api_key": "token auth_token key",
    "temperature": "temp",
    "max_num_seqs": "batch_size max_batch_size",
    "device": "gpu cuda",
    "max_model_len": "context_length max_length ctx_size",
}
ELSEWHERE = {each: option for option, names in _ELSEWHERE.items() for each in names.split()}
"""What other programs call an option -> its name here."""

PAGES = ("help", "version")
"""Options that tell something and have no value."""


class CommandLine(argparse.ArgumentParser):
    """The program's options: the settings by group, then KServe's.

    Args:
        settings: the settings by name.
        groups: heading of each group, in the order of the help page.
        exclusive: settings of which one on the command line overrules all in the environment.
        hint_for: what to do about an unknown option that is another program's, if it is one.
    """

    def __init__(
        self,
        settings: Mapping[str, Setting],
        groups: Mapping[str, str],
        exclusive: Collection[str] = (),
        hint_for: Callable[[str], str | None] = lambda _: None,
    ) -> None:
        super().__init__(
            prog="python -m vdiff_kserve",
            usage="python -m vdiff_kserve [--model_dir DIR | --model_id ID] [option ...]",
            description="Serve a diffusion language model through KServe. Without a model option, "
            "the small model inside the package is served.",
            epilog="Every option can be written with dashes or underscores, and set by an "
            f"environment variable: --max_queue by {ENV_PREFIX}MAX_QUEUE. The command line wins. "
            "docs/configuration.md has them as tables.",
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
        )
        self.add_argument("--version", action="version", version=f"vdiff_kserve {__version__}")
        self.exclusive = frozenset(exclusive)
        self._hint_for = hint_for
        self._secrets = frozenset(name for name, setting in settings.items() if setting.secret)
        self._origin = ""
        headings = {key: self.add_argument_group(title) for key, title in groups.items()}
        for name, setting in settings.items():
            facts = [setting.allowed] if setting.allowed else []
            facts.append(f"default: {setting.default_words}")
            switch: dict[str, Any] = {"nargs": "?", "const": True} if setting.kind is bool else {}
            headings[setting.group].add_argument(
                *(f"--{each}" for each in (name, *setting.aliases)),
                dest=name,
                type=setting.parse,
                metavar=setting.metavar,
                help=f"{setting.help} ({'; '.join(facts)})",
                **({"nargs": "+"} if setting.many else switch),
            )
            if setting.negation:
                headings[setting.group].add_argument(
                    f"--{setting.negation}",
                    dest=name,
                    action="store_false",
                    help=f"The same as --{name} false.",
                )
        kserve = self.add_argument_group("KServe's options")
        for action in kserve_options(settings):
            if action.default is not None:
                action.help = f"{action.help} (default: {action.default})"
            if "predictor" in action.dest or action.dest == "protocol":
                action.help = argparse.SUPPRESS  # of transformers, which call a server like this
            action.default = argparse.SUPPRESS
            kserve._add_action(action)

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and a message that says where a wrong value came from."""
        super().error(message + self._origin)

    def read(self, argv: Sequence[str], environ: Mapping[str, str]) -> dict[str, Any]:
        """The values that are given, by name; exits when one is wrong or unknown."""
        given = self._read_argv(argv)
        skip = set(given)
        if self.exclusive & skip:
            skip |= self.exclusive
        return self._read_environment(environ, skip) | given

    def _read_argv(self, argv: Sequence[str]) -> dict[str, Any]:
        flags = {plain(flag): flag for action in self._actions for flag in action.option_strings}
        spelled = []
        for token in argv:
            name, equals, value = token.partition("=")
            flag = flags.get(plain(name)) if name.startswith("--") else None
            spelled.append(f"{flag}{equals}{value}" if flag else token)
        given, unknown = self.parse_known_args(spelled)
        if unknown:
            self._refuse(unknown, bool(self._secrets & vars(given).keys()), flags)
        return vars(given)

    def _refuse(
        self, unknown: Sequence[str], among_secrets: bool, flags: Mapping[str, str]
    ) -> NoReturn:
        """Name every unknown option, and the first argument if it belongs to none."""
        names = [token.partition("=")[0] for token in unknown]
        if among_secrets and not names[0].startswith("--"):
            self.error("an argument is unknown; it may be a secret, so it is not shown")
        is_option = [bool(re.match(r"--|-[A-Za-z]", name)) for name in names]
        problems = [
            self._problem("option" if option else "argument", name, flags)
            for place, (name, option) in enumerate(zip(names, is_option, strict=True))
            if place == 0 or (option and (name.startswith("--") or not among_secrets))
        ]
        self.error("\n  ".join(problems))

    def _problem(self, kind: str, name: str, flags: Mapping[str, str]) -> str:
        if hint := self._hint_for(name):
            return f"vLLM's {kind} {name}: {hint}"
        return f"unknown {kind} {name}; {self._hint(plain(name), name[0] == '-', flags)}"

    def _hint(self, name: str, is_option: bool, flags: Mapping[str, str]) -> str:
        if len(whole := [known for known in flags if known.startswith(f"{name}_")]) == 1:
            return f"did you mean {flags[whole[0]]}?"
        if name in ELSEWHERE:
            return f"did you mean {flags[ELSEWHERE[name]]}?"
        if close := difflib.get_close_matches(name, flags, n=1):
            return f"did you mean {flags[close[0]]}?"
        return "see --help" if is_option else "a model is named by --model"

    def _read_environment(self, environ: Mapping[str, str], skip: set[str]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for action in self._actions:
            if action.dest in PAGES or action.dest in skip:
                continue
            for flag in action.option_strings:
                variable = ENV_PREFIX + plain(flag).upper()
                text = environ.get(variable, "").strip()
                if text and not SERVICE_LINK.match(text):
                    self._origin = f" (from the environment variable {variable})"
                    if action.nargs == "+":
                        found[action.dest] = self._several(action, flag, text)
                    else:
                        found |= vars(self.parse_args(self._tokens(action, flag, text)))
                    break
        self._origin = ""
        return found

    def unknown_variables(self, environ: Mapping[str, str]) -> list[str]:
        """What to say about variables that are of no option, but nearly: typing errors."""
        known = [
            plain(flag).upper()
            for action in self._actions
            if action.dest not in PAGES
            for flag in action.option_strings
        ]
        warnings = []
        for variable in environ:
            name = variable.removeprefix(ENV_PREFIX)
            if name == variable or name in known or SERVICE_VARIABLE.fullmatch(variable):
                continue
            if near := difflib.get_close_matches(name, known, n=1, cutoff=0.8):
                meant = f"{ENV_PREFIX}{near[0]}"
                warnings.append(
                    f"the environment variable {variable} is of no option; did you mean {meant}?"
                )
        return warnings

    def _several(self, action: argparse.Action, flag: str, text: str) -> list[Any]:
        parse: Any = action.type
        try:
            return [parse(each) for each in re.split(r"[,\s]+", text) if each]
        except argparse.ArgumentTypeError as error:
            self.error(f"argument {flag}: {error}")

    def _tokens(self, action: argparse.Action, flag: str, text: str) -> list[str]:
        if action.nargs != 0:
            return [f"{flag}={text}"]
        try:
            return [flag] if parse_bool(text) else []
        except argparse.ArgumentTypeError as error:
            self.error(f"argument {flag}: {error}")


def kserve_model_server() -> Any:
    """The module `kserve.model_server`, kept from reading this process's command line."""
    argv = sys.argv
    sys.argv = argv[:1]
    try:
        import kserve.model_server
    finally:
        sys.argv = argv
    return kserve.model_server


def kserve_options(settings: Mapping[str, Setting]) -> list[argparse.Action]:
    """KServe's options that are not settings of this project, as copies."""
    ours = {each for name, setting in settings.items() for each in (name, *setting.aliases)}
    options = [copy.copy(a) for a in kserve_model_server().parser._actions if a.dest not in ours]
    for option in options:
        if isinstance(option.default, bool) and option.nargs != 0:
            option.type = parse_bool
            option.metavar = "BOOL"
    return options


def plain(flag: str) -> str:
    """A flag's name, however it is spelled."""
    return flag.lstrip("-").replace("-", "_")
