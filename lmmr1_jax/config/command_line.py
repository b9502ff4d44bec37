"""From the command line to a `TrainConfig`: the config file first, then one flag for every field.

    python -m lmmr1_jax.train --config configs/rloo.py --learner.learning-rate 1e-6 --data.shuffle False --resume

tyro generates the flags, their help and the conversion of their values. What it says about wrong input fills boxes of
several lines, so wrong input is found here and said in one.
"""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import sys
import traceback
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmmr1_jax.config import renamed
from lmmr1_jax.config import schema as config_module
from lmmr1_jax.config.fields import checked, close_matches, describe_type, field_types
from lmmr1_jax.config.schema import TrainConfig
from lmmr1_jax.config.validate import check
from lmmr1_jax.runtime.errors import UserError

ALIASES = {"--resume": "--run.resume"}
HELP = """Train a Qwen2, Qwen2-VL or Qwen2.5-VL checkpoint by reinforcement learning.

--config FILE: a Python file that exports `config: TrainConfig`; without it every field has its default.
--resume: the same as --run.resume True. A flag below overrides what the file says; booleans stand alone or take
True or False; lists take several values."""


def parse_train_config(argv: Sequence[str], prog: str = "python -m lmmr1_jax.train") -> TrainConfig:
    """Reads `--config FILE` and the overrides that follow or precede it.

    Raises:
      UserError: a missing or faulty file, an unknown flag or field, a value of the wrong type or outside its range.
      SystemExit: with status 0 after `--help`, which shows every field with its line of documentation and the value
        that the file gives it.
    """
    kinds = {"--" + name.replace("_", "-"): kind for name, kind in field_types(TrainConfig).items()}
    wants_help = any(word in ("-h", "--help") for word in argv)
    given = _split_flags([word for word in argv if word not in ("-h", "--help")], kinds)
    files = [value for flag, value in given if flag == "--config"]
    base = load_config_file(files[-1]) if files else TrainConfig()
    if wants_help:
        _tyro(["--help"], base, prog, quiet=False)
    config = _override(base, [(flag, value) for flag, value in given if flag != "--config"], kinds, prog)
    check(config)
    return config


def load_config_file(path: str | Path) -> TrainConfig:
    """The `config` that a Python file exports, each field of its own type. The file may import its neighbours.

    Raises:
      UserError: the file is missing, fails to run, exports no TrainConfig, or a field has the wrong type.
    """
    if not Path(path).is_file():
        if moved := renamed.config_file_now(path):
            raise UserError(f"--config {path} is now {moved}")
        raise UserError(f"--config {path}: there is no such file")
    neighbours = str(Path(path).resolve().parent)
    sys.path.insert(0, neighbours)
    try:
        names = runpy.run_path(str(path))
    except (Exception, SystemExit) as error:
        raise UserError(f"--config {_place(path, error)}: {_reason(error)}") from error
    finally:
        sys.path.remove(neighbours)
    config = names.get("config")
    if not isinstance(config, TrainConfig):
        found = "no `config`" if config is None else f"a `config` of type {type(config).__name__}"
        raise UserError(f"--config {path} exports {found}; it must export `config = TrainConfig(...)`")
    return checked(config, f"--config {path}: config")


def _split_flags(argv: Sequence[str], kinds: dict[str, Any]) -> list[tuple[str, str]]:
    """Pairs of flag and value, flags by their own names, a boolean without a value made True."""
    pairs, rest = [], list(argv)
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        name = ALIASES.get(flag, flag).replace("_", "-")
        if not flag.startswith("--"):
            raise UserError(f"unexpected argument {flag!r}: every value follows its flag, as in --run.seed 1")
        if name != "--config" and name not in kinds:
            if now := renamed.flag_now(name):
                raise UserError(f"{flag} is now {now}{renamed.values_now(name)}")
            known = [*kinds, "--config", *ALIASES]
            raise UserError(f"unknown flag {flag}{close_matches(name, known) or '; --help lists them all'}")
        if not equals:
            # A negative number begins with one dash, a flag with two.
            if _is_list(kinds.get(name)) and rest and not rest[0].startswith("--"):
                while rest and not rest[0].startswith("--"):
                    pairs.append((name, rest.pop(0)))
                continue
            if rest and not rest[0].startswith("--"):
                value = rest.pop(0)
            elif kinds.get(name) is bool:
                value = "True"
            else:
                kind = "the path of a Python file" if name == "--config" else describe_type(kinds[name])
                raise UserError(f"{flag} needs a value: {kind}")
        pairs.append((name, value))
    return pairs


def _override(base: TrainConfig, given: list[tuple[str, str]], kinds: dict[str, Any], prog: str) -> TrainConfig:
    try:
        return _tyro(_words(given, kinds), base, prog, quiet=True)
    except SystemExit:
        pass
    for flag, value in given:  # one by one: tyro does not say which flag it stumbled over
        try:
            _tyro(_words([(flag, value)], kinds), base, prog, quiet=True)
        except SystemExit:
            raise UserError(f"{flag} is {value!r}; it must be {describe_type(kinds[flag])}") from None
    raise UserError(f"these flags can't be read together: {' '.join(flag for flag, _ in given)}")


def _is_list(kind: Any) -> bool:
    return typing.get_origin(kind) is tuple


def _words(given: list[tuple[str, str]], kinds: dict[str, Any]) -> list[str]:
    """Flags and values for tyro; the values of a list, wherever they stand, make one list, an empty one none."""
    lists: dict[str, list[str]] = {}
    words = []
    for flag, value in given:
        if _is_list(kinds[flag]):
            lists.setdefault(flag, []).extend([] if value in ("", "()") else [value])
        else:
            words.append(f"{flag}={value}")
    return words + [word for flag, values in lists.items() for word in (flag, *values)]


def _tyro(arguments: list[str], base: TrainConfig, prog: str, *, quiet: bool) -> TrainConfig:
    import tyro  # here, so that whoever only loads a config file does not pay for it

    # tyro draws some of its boxes although `console_outputs` says not to.
    unheard = io.StringIO()
    with contextlib.redirect_stderr(unheard) if quiet else contextlib.nullcontext():
        return tyro.cli(
            TrainConfig,
            default=base,
            args=arguments,
            prog=prog,
            description=HELP,
            config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
            console_outputs=not quiet,
        )


def _place(path: str | Path, error: BaseException) -> str:
    """The file and the line in it where an error came up."""
    if isinstance(error, SyntaxError) and error.lineno:
        return f"{error.filename}, line {error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f"{path}, line {lines[-1]}" if lines else str(path)


def _reason(error: BaseException) -> str:
    """The error in one line; a misspelt field of one of our dataclasses gets the names that it resembles."""
    text = " ".join(str(error).split())
    misspelt = re.match(r"(?:(\w+)\.)?__init__\(\) got an unexpected keyword argument '(\w+)'", text)
    owner = getattr(config_module, misspelt[1] or "", None) if misspelt else None
    if isinstance(owner, type):
        groups = {kind: name for name, kind in typing.get_type_hints(TrainConfig).items()}
        old = f"{groups.get(owner)}.{misspelt[2]}"
        if now := renamed.field_now(old):
            return f"{owner.__name__} has no field {misspelt[2]!r}; it is now {now!r}{renamed.values_now(old)}"
        known = list(field_types(owner)) if owner is not TrainConfig else list(owner.__dataclass_fields__)
        hint = close_matches(misspelt[2], known) or f"; its fields are {', '.join(known)}"
        return f"{owner.__name__} has no field {misspelt[2]!r}{hint}"
    if isinstance(error, SyntaxError):
        text = error.msg
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
