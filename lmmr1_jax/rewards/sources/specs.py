"""What a config says of reward functions, servers and models, read and checked before anything is loaded.

    "length=rewards/length.py:reward_func*0.5"      [NAME=]FILE.py[:FUNCTION][*WEIGHT]
    "http://a:5000/get_reward,http://b:5000/get_reward"     [NAME=]URL[,URL...][*WEIGHT]
    "helpful=models/reward*2"                       [NAME=]FOLDER[*WEIGHT]
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

from lmmr1_jax.config.schema import RewardsConfig
from lmmr1_jax.rewards.rules.assignment import by_source
from lmmr1_jax.runtime.errors import UserError

RESERVED = ("accuracy", "format", "mean", "std", "faults", "timeouts", "equal_groups", "overlong")
"""Names of the rules' parts and of figures about rewards, which no source may take."""

_ENTRY = re.compile(r"(?:(?P<name>[A-Za-z_][A-Za-z0-9_-]*)=)?(?P<target>.+?)(?:\*(?P<weight>[^*/]+))?")


@dataclasses.dataclass(frozen=True)
class FunctionSpec:
    """A reward function: its name among the metrics, its weight, its file, and its name there ("" for the default)."""

    name: str
    weight: float
    file: str
    function: str


@dataclasses.dataclass(frozen=True)
class ServerSpec:
    """A reward server: its name among the metrics, its weight, and the addresses that share its work."""

    name: str
    weight: float
    urls: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A reward model: its name among the metrics, its weight, and its Hugging Face folder."""

    name: str
    weight: float
    folder: str


def read_functions(config: RewardsConfig) -> list[FunctionSpec]:
    """The functions of `rewards.functions`.

    Raises:
      UserError: an entry can't be read, or its file doesn't exist.
    """
    specs = []
    for entry in config.functions:
        name, target, weight = _split("functions", entry, "[NAME=]FILE.py[:FUNCTION][*WEIGHT]")
        file, colon, function = target.rpartition(":")
        if not colon or function.endswith(".py"):
            file, function = target, ""
        if not Path(file).is_file():
            raise UserError(f"rewards.functions: {file}: there is no such file")
        if function and not function.isidentifier():
            raise UserError(f"rewards.functions: {entry!r}: {function!r} is no name of a function")
        specs.append(FunctionSpec(name or _as_name(Path(file).stem), weight, file, function))
    return specs


def read_servers(config: RewardsConfig) -> list[ServerSpec]:
    """The servers of `rewards.urls`; those without a name are `server`, `server_2`, ...

    Raises:
      UserError: an entry can't be read, or is no address of http or https.
    """
    specs = []
    for number, entry in enumerate(config.urls, 1):
        name, target, weight = _split("urls", entry, "[NAME=]URL[,URL...][*WEIGHT]")
        urls = tuple(target.split(","))
        for url in urls:
            try:
                parts = urlsplit(url)
                whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
            except ValueError:
                whole = False
            if not whole or not url.isascii() or re.search(r"[\s\x00-\x1f]", url):
                raise UserError(f"rewards.urls: {url!r} is no address such as http://127.0.0.1:5000/get_reward")
        specs.append(ServerSpec(name or ("server" if number == 1 else f"server_{number}"), weight, urls))
    return specs


def read_models(config: RewardsConfig) -> list[ModelSpec]:
    """The reward models of `rewards.models`.

    Raises:
      UserError: an entry can't be read, or its folder is no Hugging Face folder.
    """
    specs = []
    for entry in config.models:
        name, folder, weight = _split("models", entry, "[NAME=]FOLDER[*WEIGHT]")
        if not (Path(folder) / "config.json").is_file():
            raise UserError(f"rewards.models: {folder}: there is no Hugging Face folder (no config.json)")
        specs.append(ModelSpec(name or _as_name(Path(folder).resolve().name), weight, folder))
    return specs


def check_names(names: Iterable[str]) -> None:
    """Raises UserError where two sources, or a source and a figure of our own, would share a metric."""
    seen = set()
    for name in names:
        if name in RESERVED:
            raise UserError(
                f"a reward is called {name!r}, which is a metric of the run: give it another name, as in other_name=..."
            )
        if name in seen:
            raise UserError(f"two rewards are called {name!r}: give one another name, as in other_name=...")
        seen.add(name)


def check_rewards(config: RewardsConfig) -> None:
    """All that can be known of a run's rewards from its config and the file system; raises UserError."""
    by_source(config)
    check_names(spec.name for spec in (*read_functions(config), *read_servers(config), *read_models(config)))


def _as_name(stem: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", stem)


def _split(field: str, entry: str, form: str) -> tuple[str, str, float]:
    match = _ENTRY.fullmatch(entry.strip())
    try:
        weight = float(match["weight"] or 1.0) if match else math.nan
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise UserError(f"rewards.{field}: {entry!r} is not {form}")
    return match["name"] or "", match["target"].strip(), weight
