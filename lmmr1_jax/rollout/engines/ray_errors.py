"""What became of an engine, from the exception that Ray raised over it."""

from __future__ import annotations

import re

from lmmr1_jax.rollout.engines.protocol import EngineFailed


def cause_of(error: BaseException, kind: type[BaseException]) -> BaseException | None:
    """Ray wraps what an actor raised."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, kind) else error if isinstance(error, kind) else None


def reason_for(error: BaseException) -> str:
    """One line: what an engine said of itself, or what Ray knows of its end."""
    from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError

    cause = getattr(error, "cause", None) or error
    text = str(cause)
    if isinstance(cause, EngineFailed):
        return text
    if isinstance(cause, GetTimeoutError):
        return "it does not answer (vllm.sync_timeout)"
    if isinstance(cause, ActorUnavailableError):
        return "its process can't be reached"
    if isinstance(cause, ActorDiedError):
        if "its node has died" in text:
            return "its machine is gone"
        if "creation task" not in text:
            return "its process died"
        # A traceback; the exception's own words stand behind the last of its indented lines.
        return " ".join(re.split(r"^\s.*\n", text, flags=re.MULTILINE)[-1].split())[:300]
    return f"{type(cause).__name__}: {' '.join(text.split())[:300] or 'no message'}"
