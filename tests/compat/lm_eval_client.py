"""`lm-evaluation-harness`: its scores over HTTP must be those of its own `transformers` backend.

Three tasks of a few lines, one for each kind of question that the harness asks: which of several
endings is likeliest, how likely a text is, and what the model goes on with. Both backends open the
same folder; the harness tokenizes for the server with the folder's tokenizer.
"""

from __future__ import annotations

import json
import math
import os
import random
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import lm_eval
from lm_eval.tasks import TaskManager

FOLDER = os.environ["LLMSERVE_MODEL_FOLDER"]
URL = os.environ["LLMSERVE_URL"] + "/v1/completions"
MOST_APART = 1e-4
"""Of a score, relative: float32 on two implementations of the same model."""

TEXT = (
    "Once upon a time there was a little girl named Lily who loved to play outside in the park "
    "and one day she saw a big dog that said hello"
)
WORDS = TEXT.split(" ")

TASKS = {
    "endings": """
        output_type: multiple_choice
        doc_to_text: "{{begin}}"
        doc_to_choice: "{{endings}}"
        doc_to_target: "{{right}}"
        metric_list: [{metric: acc}, {metric: acc_norm}]
    """,
    "texts": """
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: "{{text}}"
        metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]
    """,
    "answers": """
        output_type: generate_until
        doc_to_text: "{{begin}}"
        doc_to_target: "{{text}}"
        generation_kwargs: {until: ["."], max_gen_toks: 12, do_sample: false, temperature: 0}
        metric_list: [{metric: exact_match}]
    """,
}


def rows() -> list[dict[str, object]]:
    """Beginnings with four endings each, one of them held to be right."""
    chance = random.Random(1)
    made = []
    for _ in range(40):
        at = chance.randrange(len(WORDS) - 6)
        endings = [" " + " ".join(chance.sample(WORDS, 3)) for _ in range(4)]
        begin = " ".join(WORDS[at : at + 4])
        text = " ".join(chance.sample(WORDS, 20)) + "."
        made.append(
            {"begin": begin, "endings": endings, "right": chance.randrange(4), "text": text}
        )
    return made


def write_tasks(folder: Path) -> None:
    """The tasks' files, with the rows that all of them read."""
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    head = (
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
    )
    for name, lines in TASKS.items():
        rest = "\n".join(line.strip() for line in lines.strip().splitlines())
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{head}{rest}\n")


def evaluate(kind: str, arguments: dict[str, object], folder: Path) -> tuple[dict, list]:
    """Scores by task and metric, and the texts that were generated."""
    found = lm_eval.simple_evaluate(
        model=kind,
        model_args=arguments,
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )
    scores = {
        (task, name.partition(",")[0]): value
        for task, metrics in found["results"].items()
        for name, value in metrics.items()
        if isinstance(value, float) and "stderr" not in name
    }
    samples = sorted(found["samples"]["answers"], key=lambda sample: sample["doc_id"])
    return scores, [sample["resps"] for sample in samples]


def main() -> None:
    """Score twice and compare."""
    served = {
        "model": os.environ["LLMSERVE_MODEL"], "base_url": URL, "tokenizer": FOLDER,
        "tokenizer_backend": "huggingface", "num_concurrent": 4, "max_retries": 1,
        "add_bos_token": True,  # as this folder's tokenizer does; the harness does not ask it here
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        write_tasks(Path(temporary))
        over_http = evaluate("local-completions", served, Path(temporary))
        own = evaluate(
            "hf", {"pretrained": FOLDER, "dtype": "float32", "device": "cpu"}, Path(temporary)
        )
    assert over_http[0].keys() == own[0].keys()
    assert {"endings", "texts", "answers"} == {task for task, _ in own[0]}
    for (task, metric), score in own[0].items():
        other = over_http[0][task, metric]
        print(
            f"lm-eval {version('lm_eval')}: {task} {metric}: {other:.6f} here, {score:.6f} theirs"
        )
        assert math.isclose(other, score, rel_tol=MOST_APART), (task, metric)
    assert over_http[1] == own[1], "the generated texts differ"


main()
