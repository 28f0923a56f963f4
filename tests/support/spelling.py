"""What the scripted runner answers: computed, or dictated."""

from __future__ import annotations

from llmserve.runners.fake import Script, next_token
from llmserve.runners.protocol import SamplingRow
from llmserve.text.tokenizer import Tokenizer

VOCAB = 320
"""Of `support.models.make_model_folder`."""


def greedy(prompt: list[int], count: int) -> list[int]:
    """The scripted runner's answer, computed without a server."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(next_token(ids, VOCAB))
    return ids[len(prompt) :]


def spell(text: str, tokenizer: Tokenizer) -> Script:
    """A script that answers every prompt with `text`, whatever the prompt is."""
    ids = tokenizer.encode(text, add_special_tokens=False)

    def script(row: SamplingRow) -> int:
        made = len(row.token_ids) - row.num_prompt_tokens
        return ids[made] if made < len(ids) else 0

    return script


def chat_of(text: str) -> dict[str, object]:
    """A conversation of one turn, as fields of a request."""
    return {"messages": [{"role": "user", "content": text}]}
