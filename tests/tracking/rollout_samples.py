"""A group with known figures: three completions, the first right, the second cut, the third killed by its verifier."""

import numpy as np

from lmmr1_jax.types.records import Completion, EncodedPrompt, Image, Prompt, Reward, Rollout


def completion(length: int, finish_reason: str) -> Completion:
    return Completion(
        np.arange(length, dtype=np.int32),
        np.zeros(length, np.float32),
        finish_reason,
        np.zeros(length, np.int32),
    )


def group(prompt_id: str = "shapes-0", rewards: tuple[Reward, ...] | None = None) -> Rollout:
    messages = [
        {"role": "system", "content": "Think first."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "How many red shapes?"},
                {"type": "image", "image": "data:image/png;base64," + "A" * 5000},
            ],
        },
    ]
    pixels = np.full((56, 84, 3), 200, np.uint8)
    pixels[:28] = (255, 0, 0)
    encoded = EncodedPrompt(
        Prompt(messages, "$3$", prompt_id, "shapes", "shapes.jsonl", 0),
        np.arange(9, dtype=np.int32),
        np.zeros((3, 9), np.int32),
        (Image(pixels, (1, 4, 6)),),
        np.arange(6, dtype=np.int32),
        9,
    )
    rewards = rewards or (
        Reward(1.5, {"accuracy": 1.0, "format": 1.0}),
        Reward(0.5, {"accuracy": 0.0, "format": 1.0}),
        Reward(0.0, {}, fault="timeout"),
    )
    return Rollout(encoded, (completion(4, "stop"), completion(8, "length"), completion(3, "stop")), rewards)
