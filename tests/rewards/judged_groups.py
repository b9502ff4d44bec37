"""Groups for reward sources: completions are texts, tokens are their bytes."""

import numpy as np

from lmmr1_jax.types.records import Completion, EncodedPrompt, Image, Prompt, Rollout


def decode(token_ids, *, special=False):
    text = bytes(int(token) for token in token_ids).decode()
    return text if special else text.replace("<|im_end|>", "").replace("<|image_pad|>", "")


def rollout(texts, label="3", prompt="<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n", name="7"):
    ids = lambda text: np.frombuffer(text.encode(), np.uint8).astype(np.int32)  # noqa: E731
    completions = tuple(
        Completion(ids(text), np.zeros(len(text), np.float32), "stop", np.zeros(len(text), np.int32)) for text in texts
    )
    address = "data:image/png;base64," + "A" * 10_000
    messages = [{"role": "user", "content": [{"type": "image", "image": address}, {"type": "text", "text": "How?"}]}]
    image = Image(np.zeros((28, 56, 3), np.uint8), (1, 2, 4))
    encoded = EncodedPrompt(
        Prompt(messages, label, name, "counting", "set.jsonl", 0, "math"),
        ids(prompt),
        np.zeros((3, 1)),
        (image,),
        np.zeros(0),
        1,
    )
    return Rollout(encoded, completions)
