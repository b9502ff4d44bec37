"""Which jax and flax go together, found from package metadata alone so that nothing heavy is imported."""

from __future__ import annotations

import importlib.metadata
import platform
import re

TESTED = "Python 3.11 with jax 0.10.2 and flax 0.12.8, Python 3.12 with jax 0.12.0 and flax 0.12.12"
REPORTED = (
    "lmmr1-jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "safetensors",
    "transformers",
    "math-verify",
)


def broken_pair(jax: str, flax: str) -> str | None:
    """Why two versions are known not to work together; None for the tested pairs and for all that nobody has tried.

    Found by trying: flax 0.12.8 fails to import under jax 0.11.1, 0.12.9 under 0.11.2 (each uses parts of
    `jax.experimental.hijax` that were removed), and both under 0.12.0; flax 0.12.10 and up work with all of these.
    """
    if _numbers(flax) <= (0, 12, 8) and _numbers(jax) >= (0, 11, 1):
        return f"flax {flax} can't be imported with jax {jax}: jax 0.11.1 and up need flax 0.12.9 or newer"
    if _numbers(flax) <= (0, 12, 9) and _numbers(jax) >= (0, 11, 2):
        return f"flax {flax} can't be imported with jax {jax}: jax 0.11.2 and up need flax 0.12.10 or newer"
    return None


def check_versions() -> None:
    """Raises ImportError for a pair of jax and flax that is known to be broken; others pass, tested or not."""
    jax, flax = _installed("jax"), _installed("flax")
    if jax and flax and (reason := broken_pair(jax, flax)):
        raise ImportError(f"{reason}; tested are {TESTED}")


def versions() -> dict[str, str]:
    """Python and the packages that a run's figures depend on, by name; what is not installed is left out."""
    found = {package: _installed(package) for package in REPORTED}
    return {"python": platform.python_version()} | {package: version for package, version in found.items() if version}


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])
