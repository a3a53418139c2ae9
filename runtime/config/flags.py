"""The command line: flags, the config file, overrides. A Python config file is executed when given as --config."""

import runpy
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from runtime.config.check import unread
from runtime.config.errors import UsageError
from runtime.config.keys import base_values, flatten
from runtime.config.resume import read_json
from runtime.config.suggest import nearest_name, unknown_key

PARSERS = {
    int: flags.IntegerParser(),
    float: flags.FloatParser(),
    bool: flags.BooleanParser(),
    str: flags.ArgumentParser(),
}


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "workdir", None, "Where the run lives; default runs/<config>-<date>-<hash>.", flag_values=values
    )
    flags.DEFINE_integer(
        "simulate", None, "Train on this many simulated CPU devices.", flag_values=values, lower_bound=1
    )
    flags.DEFINE_bool("dry_run", False, "Build, compile, print the table; train nothing.", flag_values=values)
    flags.DEFINE_bool("resume", True, "Go on if the workdir has a run; --noresume refuses to.", flag_values=values)
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, for several processes.", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "How many processes there are.", flag_values=values, lower_bound=1)
    flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", flag_values=values, lower_bound=0)
    flags.DEFINE_integer(
        "heartbeat", 30, "Seconds after which a silent process is dead.", flag_values=values, lower_bound=1
    )
    flags.DEFINE_bool("help", False, "Show this help.", flag_values=values, short_name="h")


def parse(argv: Sequence[str], doc: str) -> tuple[Any, Any]:
    """argv (with the program's name first) -> (config, flags). Raises UsageError; prints help and exits if asked.

    Of an option given twice the last one counts.
    """
    values = flags.FlagValues()
    define_flags(values)
    if {"-h", "-help", "--help"} & set(argv):
        options = values.get_help(include_special_flags=False)
        print(f"{doc}\n{options}\n  --config: a Python config file.\n  --config.KEY=VALUE: overrides one of its keys.")
        raise SystemExit(0)
    given = dict(map(_split, argv[1:]))
    workdir = given.get("workdir")
    config_file = given.pop("config") or "" if "config" in given else None
    if "workdir" in given and not workdir:
        raise UsageError("--workdir needs a folder, as in --workdir=runs/first")
    if config_file is not None:
        config = _execute(config_file)
    elif workdir and (Path(workdir) / "config.json").is_file():
        config = read_json(Path(workdir))
    elif workdir:
        raise UsageError(f"--workdir={workdir} has no config.json to resume from: give a --config=configs/….py")
    else:
        raise UsageError("--config is missing, as in --config=configs/quickstart.py (or --workdir of an earlier run)")
    before = dict(flatten(config))
    _check_names(given, before, values)
    wrong, overridden = [], {}
    for name, text in given.items():
        key = name.removeprefix("config.")
        try:
            if key != name:
                overridden[key] = _value(name, text, PARSERS.get(type(before[key]), PARSERS[str]))
            elif name in values:
                setattr(values, name, _value(name, text, values[name].parser))
            else:  # --noresume
                setattr(values, name.removeprefix("no"), not _value(name, text, flags.BooleanParser()))
        except ValueError as error:
            wrong.append(str(error))
    config.update_from_flattened_dict(overridden)
    wrong += unread(dict(flatten(config)), [key for key, value in overridden.items() if value != before[key]])
    if wrong:
        raise UsageError("\n".join(wrong))
    flags.DEFINE_string("config_name", config_file or workdir, "", flag_values=values)
    values.mark_as_parsed()
    return config.lock(), values


def _split(argument: str) -> tuple[str, str | None]:
    if not argument.startswith("-"):
        raise UsageError(f"unexpected argument {argument!r}: options start with -- and take their value after =")
    name, equals, value = argument.lstrip("-").partition("=")
    return name, value if equals else None


def _value(name: str, text: str | None, parser: Any) -> Any:
    """What `text` means to this option; an option without = is a switch, turned on."""
    expected = parser.syntactic_help or ("true or false" if isinstance(parser, flags.BooleanParser) else "a value")
    if text is None and expected != "true or false":
        raise ValueError(f"--{name} needs {expected}, as in --{name}=…")
    try:
        return parser.parse("true" if text is None else text)
    except (ValueError, TypeError):
        raise ValueError(f"--{name}={text}: expected {expected}") from None


def _execute(config_file: str) -> Any:
    """What get_config() in this Python file returns."""
    if not Path(config_file).is_file():
        raise UsageError(f"--config={config_file}: there is no such file. Look into configs/.")
    try:
        config = runpy.run_path(config_file)["get_config"]()
    except Exception as error:  # whatever the user's own Python file raises
        if isinstance(error, KeyError) and error.args == ("get_config",):
            raise UsageError(f"--config={config_file} has no function get_config(): see configs/tiny.py") from error
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == config_file]
        where = f", line {lines[-1]}" if lines else ""
        raise UsageError(f"--config={config_file} fails{where}: {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise UsageError(f"--config={config_file}: get_config() returns {config!r}, not a config: see configs/tiny.py")
    keys, known = [key for key, _ in flatten(config)], list(base_values())
    for key in keys:
        if key not in known:
            raise UsageError(f"--config={config_file} sets the {unknown_key(key, known)}")
    if missing := [key for key in known if key not in keys]:
        raise UsageError(f"--config={config_file} has no {', '.join(missing)}: start from base.get_config()")
    return config


def _check_names(given: Iterable[str], config: dict[str, Any], values: flags.FlagValues) -> None:
    keys = list(config)
    groups = {".".join(parts[:n]) for parts in (key.split(".") for key in keys) for n in range(1, len(parts))}
    for name in given:
        if name.startswith("config."):
            key = name.removeprefix("config.")
            if key in groups:
                example = next(k for k in keys if k.startswith(f"{key}."))
                raise UsageError(f"--config.{key} is a group; set one of its keys, as in --config.{example}=…")
            if key not in keys:
                raise UsageError(unknown_key(key, keys))
        elif name not in values and not (name.startswith("no") and name[2:] in values and values[name[2:]].boolean):
            options = [*(f for f in values if len(f) > 1), "config"]
            raise UsageError(f"unknown option --{name}: did you mean --{nearest_name(name, options)}? See --help.")
