"""XLA's compilations: kept between runs in a cache on disk, and counted while a run goes on.

A step should compile a fixed, small number of programs. The count says so: it is a metric of every run.
"""

from __future__ import annotations

import os
from pathlib import Path

import jax

# Emitted around every compilation, also when the persistent cache answers it: tracing and lowering were then repeated.
_COMPILED = "/jax/core/compile/backend_compile_duration"
# jax's own limit is 1 s; a tiny model's programs are many and quicker than that.
_WORTH_KEEPING_SECONDS = 0.3


def enable_compilation_cache() -> Path | None:
    """Keeps compiled programs under `$XDG_CACHE_HOME/lmmr1_jax/xla` (`~/.cache` without the variable).

    jax's own variables win: JAX_COMPILATION_CACHE_DIR (another folder), JAX_ENABLE_COMPILATION_CACHE=0 (none) and
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS. The folder grows without limit and can be deleted at any time. A folder
    that can't be written costs a warning of jax's, never the run. Call it before the first compilation.

    Returns:
      The folder in use, None where caching is off.
    """
    if not jax.config.jax_enable_compilation_cache:
        return None
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "lmmr1_jax" / "xla"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _WORTH_KEEPING_SECONDS)
    folder = jax.config.jax_compilation_cache_dir
    return Path(folder) if folder else None


class CompilationCounter:
    """Counts backend compilations of this process from its creation to `close`, by the function's name.

    Attributes:
      count: compilations since the creation or the last `restart`.
      names: the compiled functions in order, as jax calls them (`jit(update)`, and eager operations by theirs).
    """

    def __init__(self):
        self.names: list[str] = []
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    @property
    def count(self) -> int:
        return len(self.names)

    def restart(self) -> None:
        """Forgets what was compiled so far: a run calls it after its first step."""
        self.names.clear()

    def close(self) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event: str, seconds: float, **details: str | int) -> None:
        if event == _COMPILED:
            self.names.append(str(details.get("fun_name", "?")))
