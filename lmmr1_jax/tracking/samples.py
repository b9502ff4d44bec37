"""What was asked and written, as a person reads it: lines of `samples.jsonl` and TensorBoard's texts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from lmmr1_jax.data.messages import without_pixels
from lmmr1_jax.types.records import Rollout


def sample_record(step: int, rollout: Rollout, decode: Callable[[np.ndarray], str]) -> dict[str, Any]:
    """A line of `samples.jsonl`: the prompt and every completion of its group with its reward's parts."""
    prompt = rollout.encoded.prompt
    completions = []
    for number, completion in enumerate(rollout.completions):
        entry = {
            "text": decode(completion.token_ids),
            "tokens": len(completion.token_ids),
            "finish_reason": completion.finish_reason,
            "versions": [int(completion.policy_version.min()), int(completion.policy_version.max())],
        }
        if rollout.rewards:
            reward = rollout.rewards[number]
            entry |= {"reward": reward.total, "parts": reward.parts, "fault": reward.fault}
        completions.append(entry)
    return {
        "step": step,
        "prompt_id": prompt.prompt_id,
        "data_source": prompt.data_source,
        "messages": without_pixels(prompt.messages),
        "answer": prompt.label,
        "completions": completions,
    }


def sample_text(record: dict[str, Any]) -> str:
    """The same as Markdown; completions stand as indented code, so that their own marks are not interpreted."""
    parts = [f"**{record['prompt_id']}** ({record['data_source']}), answer `{record['answer']}`"]
    parts += [f"*{message.get('role', '?')}*\n\n{_code(_text_of(message))}" for message in record["messages"]]
    for completion in record["completions"]:
        earned = ", ".join(f"{name} {value:g}" for name, value in completion.get("parts", {}).items())
        fault = f", {completion['fault']}" if completion.get("fault") else ""
        head = f"**reward {completion.get('reward', float('nan')):.3g}** ({earned}{fault})"
        parts.append(
            f"{head}, {completion['tokens']} tokens, {completion['finish_reason']}\n\n{_code(completion['text'])}"
        )
    return "\n\n".join(parts)


def _code(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines())


def _text_of(message: dict[str, Any]) -> str:
    content = message.get("content", "")
    if isinstance(content, str):
        return content
    return "\n".join(str(item.get("text", f"[{item.get('type', '?')}]")) for item in content)
