"""The command line: flags, the config file, overrides. A Python config file is executed when given as --config."""

import argparse
import importlib.metadata
import platform
import re
import runpy
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

import runtime
from runtime import usage
from runtime.config.check import unread
from runtime.config.errors import UsageError
from runtime.config.keys import (
    EXPECTED,
    Methods,
    base_values,
    convert,
    converted,
    expand_home,
    flatten,
    local_path,
    nested,
    read_text,
)
from runtime.config.origin import take_origin
from runtime.config.resume import objects_of, read_json
from runtime.config.suggest import nearest_name, unknown_key


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "workdir", None, "where the run lives; default: runs/<config>-<date>-<hash>", flag_values=values
    )
    flags.DEFINE_integer(
        "simulate", None, "train on this many simulated CPU devices", flag_values=values, lower_bound=1
    )
    flags.DEFINE_bool("dry_run", False, "build, compile, print the table; train nothing", flag_values=values)
    flags.DEFINE_string(
        "target", None, "with --dry_run: the machine to compile for, as v5p-128 or h100:4x8", flag_values=values
    )
    flags.DEFINE_string("save", None, "with --target: a folder for what is compiled", flag_values=values)
    flags.DEFINE_string(
        "link", None, "a slow link, as 100mbit or 10gbit,20ms: what a step takes on it", flag_values=values
    )
    flags.DEFINE_float(
        "step_seconds", None, "of computing, for --link in a dry run", flag_values=values, lower_bound=1e-6
    )
    flags.DEFINE_string("memory", None, "of one device, as 80GiB: what does not fit is refused", flag_values=values)
    flags.DEFINE_bool(
        "resume", True, "refuse a workdir that has a run, in place of going on with it", flag_values=values
    )
    flags.DEFINE_string("coordinator", None, "of process 0, for several processes", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "how many processes there are", flag_values=values, lower_bound=1)
    flags.DEFINE_integer("process_id", None, "which of them this is, from 0", flag_values=values, lower_bound=0)
    flags.DEFINE_integer(
        "heartbeat", 30, "seconds after which a silent process is dead", flag_values=values, lower_bound=1
    )
    flags.DEFINE_bool("version", False, "show the versions of this program, JAX and Python", flag_values=values)
    flags.DEFINE_float(
        "wait", 60, "seconds to wait for the other processes to be started", flag_values=values, lower_bound=1
    )
    flags.DEFINE_bool("help", False, "show this help", flag_values=values, short_name="h")


def version() -> str:
    """Of this program and of what computes: `slackline 0.1.0 (JAX 0.12.0, Python 3.13.1)`."""
    return f"slackline {runtime.VERSION} (JAX {importlib.metadata.version('jax')}, Python {platform.python_version()})"


def parse(argv: Sequence[str], doc: str, methods: Methods) -> tuple[Any, Any]:
    """argv (with the program's name first) -> (config, flags). Raises UsageError; prints help or version and exits if
    asked.

    Of an option given twice the last one counts. `flags.notes`: what was changed without being asked for.
    """
    values = flags.FlagValues()
    define_flags(values)
    if {"-h", "-help", "--help"} & set(argv):
        print(_help(doc, values), end="")
        raise SystemExit(0)
    if "--version" in argv:
        print(version())
        raise SystemExit(0)
    given = dict(split(argv[1:]))
    config_file, before = _start(given)
    _check_names(given, before, values)
    wrong, overridden = [], {}
    for name, text in given.items():
        key = name.removeprefix("config.")
        try:
            if key != name:
                overridden[key] = typed(key, text)
            elif name in values:
                setattr(values, name, _flag_value(name, text, values[name].parser))
            else:  # --noresume
                setattr(values, name.removeprefix("no"), not _flag_value(name, text, flags.BooleanParser()))
        except ValueError as error:
            wrong.append(f"--{error}" if key == name else f"--config.{error}")
    workdir = expand_home(given.get("workdir") or "") or None
    flat, notes, clashes = override(before, overridden, workdir, methods)
    if wrong := wrong + clashes:
        raise UsageError("\n".join(wrong))
    values.workdir = workdir
    flags.DEFINE_string("config_name", config_file or workdir, "", flag_values=values)
    flags.DEFINE_multi_string("notes", notes, "", flag_values=values)
    flags.DEFINE_multi_string("typed", list(overridden), "", flag_values=values)
    values.mark_as_parsed()
    return nested(flat).lock(), values


VALUES = {
    "workdir": "PATH",
    "target": "MACHINE",
    "save": "PATH",
    "link": "RATE[,LATENCY]",
    "memory": "SIZE",
    "coordinator": "HOST:PORT",
}


def _help(doc: str, values: flags.FlagValues) -> str:
    shown = usage.parser(doc, "python train.py")
    shown.add_argument("--config", metavar="FILE", help="one like configs/quickstart.py; an earlier run needs none")
    shown.add_argument("--config.KEY", metavar="VALUE", help="in place of what that has; configs/base.py has all")
    for flag in (flag for found in values.flags_by_module_dict().values() for flag in found if flag.name != "help"):
        if flag.boolean:
            shown.add_argument(f"--{'no' if flag.value else ''}{flag.name}", action="store_true", help=flag.help)
        else:
            kind = {"int": int, "float": float}.get(flag.flag_type(), str)
            called = {"metavar": VALUES.get(flag.name), "type": kind, "default": flag.value}
            shown.add_argument(f"--{flag.name}", **called, help=flag.help)
    return shown.format_help()


def override(
    before: dict[str, Any], typed: dict[str, Any], workdir: str | None, methods: Methods
) -> tuple[dict[str, Any], list[str], list[str]]:
    """(the config's values with those typed in place of some, what must be said of that, what is wrong)."""
    flat = before | typed
    notes, wrong = take_origin(flat, typed, workdir)
    notes += _shorten_warm_up(before, flat, typed)
    return flat, notes, wrong + [*unread(flat, [key for key, x in typed.items() if x != before[key]], methods)]


def split(arguments: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """(name, value) of each option: `--name=value`, `--name value`, or `--switch` (None)."""
    name: str | None = None
    for argument in arguments:
        if re.match(r"--?[A-Za-z_]", argument):
            if name is not None:
                yield name, None
            name, equals, value = argument.lstrip("-").partition("=")
            if equals:
                yield name, value
                name = None
        elif name is None:
            raise UsageError(f"unexpected argument {argument!r}: options start with -- and are followed by their value")
        else:
            yield name, argument
            name = None
    if name is not None:
        yield name, None


def _start(given: dict[str, str | None]) -> tuple[str | None, dict[str, Any]]:
    """(config file, {key: value}) that the command line starts from: --config, or the workdir's config.json."""
    try:
        workdir = local_path("--workdir", given.get("workdir") or "")
    except ValueError as error:
        raise UsageError(str(error)) from error
    config_file = expand_home(given.pop("config") or "") if "config" in given else None
    if "workdir" in given and not workdir:
        raise UsageError("--workdir needs a folder, as in --workdir=runs/first")
    if config_file is not None:
        return config_file, dict(flatten(execute(config_file)[0]))
    if workdir and (Path(workdir) / "config.json").is_file():
        if objects := objects_of(Path(workdir)):
            named = ", ".join(f"{key}: {x['class']}" for key, x in objects.items())
            raise UsageError(
                f"--workdir={workdir}: this run was made from Python with objects that a command line cannot name "
                f"({named}). Go on with slackline.fit, given these and workdir={workdir!r}"
            )
        return None, dict(flatten(read_json(Path(workdir))))
    if workdir:
        raise UsageError(f"--workdir={workdir} has no config.json to resume from: give a --config=configs/….py")
    raise UsageError("--config is missing, as in --config=configs/quickstart.py (or --workdir of an earlier run)")


def _shorten_warm_up(before: dict[str, Any], flat: dict[str, Any], overridden: dict[str, Any]) -> list[str]:
    """A run made shorter on the command line keeps the warm-up's share of it, where the whole would not fit."""
    key, steps = "optimizer.warmup_steps", flat.get("steps", 0)
    if key in overridden or "steps" not in overridden or not 0 < steps <= flat[key] < before["steps"]:
        return []
    flat[key], all_of_it = before[key] * steps // before["steps"], before["steps"]
    note = f"{key}={before[key]} does not fit into steps={steps}"
    return [f"{note}: it is {flat[key]}, the same share as of {all_of_it}"]


def with_changes(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """(options, the words --config.KEY=VALUE). Raises UsageError for a word that is neither."""
    args, rest = parser.parse_known_args(argv)
    for word in rest:
        if not word.startswith("--config.") or "=" not in word:
            name = parser.prog.removeprefix("python ")
            raise UsageError(f"{word}: not an option of {name}, which takes keys as --config.KEY=VALUE: see --help")
    return args, rest


def typed(key: str, text: str | None) -> Any:
    """A key's value as it is typed; None: the key alone. Raises ValueError."""
    return convert(key, _value(key, text, type(base_values()[key])))


def _value(name: str, text: str | None, kind: type) -> Any:
    """What `text` means to this key; an option without a value is a switch, turned on."""
    expected = EXPECTED.get(kind, "a value")
    if text is None and kind is not bool:
        raise ValueError(f"{name} needs {expected} after it")
    try:
        return read_text(kind, "true" if text is None else text)
    except ValueError:
        raise ValueError(f"{name}={text}: expected {expected}") from None


def _flag_value(name: str, text: str | None, parser: Any) -> Any:
    expected = parser.syntactic_help or ("true or false" if isinstance(parser, flags.BooleanParser) else "a value")
    if text is None and expected != "true or false":
        raise ValueError(f"{name} needs {expected} after it")
    try:
        return parser.parse("true" if text is None else text)
    except (ValueError, TypeError):
        raise ValueError(f"{name}={text}: expected {expected}") from None


def execute(config_file: str) -> tuple[Any, dict[str, Any]]:
    """(what get_config() in this Python file returns, with every value as its key holds it; the names in the file)."""
    where = f"--config={config_file}"
    if not Path(config_file).is_file():
        raise UsageError(f"{where}: there is no such file. Look into configs/.")
    try:
        names = runpy.run_path(config_file)
        config = names["get_config"]()
    except Exception as error:  # whatever the user's own Python file raises
        if isinstance(error, KeyError) and error.args == ("get_config",):
            raise UsageError(f"{where} has no function get_config(): see configs/tiny.py") from error
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == config_file]
        line = f", line {lines[-1]}" if lines else ""
        raise UsageError(f"{where} fails{line}: {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise UsageError(f"{where}: get_config() returns {config!r}, not a config: see configs/tiny.py")
    return checked(config, where), names


def checked(config: Any, where: str) -> Any:
    """The config with every value as its key holds it. Raises UsageError for keys that do not exist, or are missing."""
    flat = converted(dict(flatten(config)), f"{where} sets")
    if missing := [key for key in base_values() if key not in flat]:
        raise UsageError(f"{where} has no {', '.join(missing)}: start from base.get_config()")
    return nested(flat)


def _check_names(given: Mapping[str, str | None], config: dict[str, Any], values: flags.FlagValues) -> None:
    keys = list(config)
    groups = {".".join(parts[:n]) for parts in (key.split(".") for key in keys) for n in range(1, len(parts))}
    for name, text in given.items():
        key = name.removeprefix("config.")
        known = name in values or (name.startswith("no") and name[2:] in values and values[name[2:]].boolean)
        if key in groups:
            example = next(k for k in keys if k.startswith(f"{key}."))
            raise UsageError(f"--config.{key} is a group; set one of its keys, as in --config.{example}=…")
        if key != name and key not in keys:
            raise UsageError(unknown_key(key, keys))
        if key == name and not known:
            options = [*(f for f in values if len(f) > 1), "config", *keys]
            near = nearest_name(name, options)
            value = "" if text is None else f"={text}"
            raise UsageError(
                f"unknown option --{name}: did you mean --{'config.' * (near in keys)}{near}{value}? See --help."
            )
