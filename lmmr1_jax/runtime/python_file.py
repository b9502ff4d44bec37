"""A person's own Python file as a module: a reward function, a verifier, an algorithm."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType


def load_module(file: str) -> ModuleType:
    """Runs a file, which may import its neighbours. Nothing here imports jax.

    Raises:
      ValueError: it is no Python file or cannot be run; the text follows the file's name.
    """
    path = Path(file).resolve()
    if not path.is_file():
        raise ValueError("there is no such file")
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(f"own_file_{path.stem}", path)
    if spec is None:
        raise ValueError("not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look it up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"cannot be loaded: {type(error).__name__}: {error}{place(file, error)}") from None
    return module


def place(file: str, error: BaseException) -> str:
    """The line of the file where an error came up: " in line 7", or nothing."""
    if isinstance(error, SyntaxError):
        return ""  # its text says so
    names = (file, str(Path(file).resolve()))
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename in names]
    return f" in line {lines[-1]}" if lines else ""
