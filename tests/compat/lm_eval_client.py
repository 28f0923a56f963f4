"""lm-evaluation-harness' `local-completions`: log-likelihoods by echo, and generated texts."""

from __future__ import annotations

import os

from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

model = LocalCompletionsAPI(
    base_url=os.environ["LLMSERVE_URL"] + "/v1/completions",
    model=os.environ["LLMSERVE_MODEL"],
    tokenizer_backend=None,
    tokenized_requests=False,
    num_concurrent=1,
    max_retries=1,
)
generated = model.generate_until(
    [
        Instance(
            request_type="generate_until", doc={}, idx=0,
            arguments=("Once upon a time", {"max_gen_toks": 5, "until": ["."], "temperature": 0}),
        )
    ]
)  # fmt: skip
assert isinstance(generated[0], str)
print("lm-eval: generate_until ok")
