"""The offline API: texts, scores and vectors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llmserve.adapters import save_adapter
from llmserve.engine.replay import replay
from llmserve.engine.request import FinishReason
from llmserve.errors import ConfigError, RequestError
from llmserve.llm import LLM
from llmserve.model.attention import CausalAttention
from llmserve.model.weights import load_model
from llmserve.runners.registry import load_runner
from llmserve.sampling import SamplingParams
from support.adapters import random_adapter
from support.models import make_model_folder

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = make_model_folder(tmp_path_factory.mktemp("llm") / "model")
    with LLM(folder, cache_bytes=1 << 20) as model:
        yield model


def test_text_is_the_decoded_ids(llm: LLM) -> None:
    completion = llm.generate(["Once upon"], GREEDY)[0]
    choice = completion.choices[0]
    assert completion.prompt_token_ids == llm.tokenizer.encode("Once upon")
    assert len(choice.token_ids) == 24
    assert choice.finish_reason is FinishReason.LENGTH
    assert completion.text == llm.tokenizer.decode(choice.token_ids)


def test_batch_gives_each_prompt_what_it_gets_alone(llm: LLM) -> None:
    prompts = ["Once", "One day she saw", [5, 6, 7], "日本語"]
    params = [SamplingParams(max_tokens=20, seed=i, temperature=i * 0.5) for i in range(4)]
    together = llm.generate(prompts, params)
    alone = [llm.generate([prompt], one)[0] for prompt, one in zip(prompts, params, strict=True)]
    assert together == alone


def test_stream_concatenates_to_the_text(llm: LLM) -> None:
    params = SamplingParams(max_tokens=60, seed=3)
    pieces = [delta.text for delta in llm.stream("The dog", params)]
    assert "".join(pieces) == llm.generate(["The dog"], params)[0].text


def test_stream_left_early_leaves_nothing_behind(llm: LLM) -> None:
    stream = llm.stream("The dog", SamplingParams(max_tokens=60, seed=3))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    llm.generate(["The dog"], GREEDY)
    llm.engine.check()
    assert not llm.engine.has_work
    assert llm.engine.stats().num_free_blocks == sum(llm.config.num_blocks)


def test_stop_string_ends_the_text_and_the_sequence(llm: LLM) -> None:
    whole = llm.generate(["Once upon"], GREEDY)[0].text
    stop = whole[10:13]
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, stop=(stop,))
    choice = llm.generate(["Once upon"], params)[0].choices[0]
    assert choice.text == whole[: whole.index(stop)]
    assert (choice.finish_reason, choice.stop_reason) == (FinishReason.STOP, stop)
    assert not llm.engine.has_work


def test_choices_are_reproducible_by_seed(llm: LLM) -> None:
    params = SamplingParams(max_tokens=12, n=3, seed=9)
    first, second = (llm.generate(["She loved"], params)[0] for _ in range(2))
    assert first == second
    assert len({choice.text for choice in first.choices}) == 3


def test_chat_goes_through_the_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    completion = llm.chat([messages], GREEDY)[0]
    text = llm.tokenizer.decode(completion.prompt_token_ids, skip_special_tokens=False)
    assert text == "<user>Hello\n<assistant>"


def test_progress_counts_prompts_and_tokens(llm: LLM) -> None:
    seen: list[tuple[int, int]] = []
    llm.generate(["a", "b"], GREEDY, on_progress=lambda done, tokens: seen.append((done, tokens)))
    assert seen[-1] == (2, 48)
    assert seen == sorted(seen)


def test_one_bad_prompt_refuses_all_and_queues_none(llm: LLM) -> None:
    with pytest.raises(RequestError, match="empty"):
        llm.generate(["fine", []], GREEDY)
    llm.engine.step(0.0)
    assert not llm.engine.has_work


def test_wrong_number_of_parameters_is_refused(llm: LLM) -> None:
    with pytest.raises(RequestError, match="1 sampling parameters for 2 prompts"):
        llm.generate(["a", "b"], [GREEDY])


def test_stream_of_several_choices_is_refused(llm: LLM) -> None:
    with pytest.raises(RequestError, match="n=2"):
        next(llm.stream("a", SamplingParams(n=2)))


def test_context_above_the_models_is_refused(llm: LLM) -> None:
    with pytest.raises(ConfigError, match="context of 256"):
        LLM(llm.checkpoint.path, max_seq_len=300)


def test_real_checkpoint_gives_the_known_text(stories260k: Path) -> None:
    expected = (stories260k / "expected-greedy-200.txt").read_text(encoding="utf-8")
    params = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
    with LLM(stories260k) as llm:
        prompts: list[list[int]] = [[1], *([1, *range(10, 10 + 7 * i)] for i in range(1, 16))]
        alone = llm.generate(prompts[:1], params)[0]
        batched = llm.generate(prompts, params)[0]
        streamed = "".join(delta.text for delta in llm.stream([1], params))
    assert alone.text == batched.text == streamed == expected


def test_score_is_the_log_probability_of_the_whole_forward(llm: LLM) -> None:
    text = "One day she saw a big dog"
    (score,) = llm.score([text])
    ids = llm.tokenizer.encode(text)
    exact = next_logprobs(llm, ids)
    assert score.token_ids == ids[1:]
    assert score.logprobs == pytest.approx(
        [float(exact[place, token]) for place, token in enumerate(ids[1:])], abs=1e-5
    )
    assert score.logprob == pytest.approx(sum(score.logprobs))
    assert score.perplexity == pytest.approx(math.exp(-score.logprob / (len(ids) - 1)))


def test_score_of_a_continuation_counts_its_tokens_alone(llm: LLM) -> None:
    prompt, tail = llm.tokenizer.encode("One day"), [40, 41, 42]
    (score,) = llm.score([prompt], [tail])
    (whole,) = llm.score([[*prompt, *tail]])
    assert score.token_ids == tail
    assert score.logprobs == whole.logprobs[-3:]


def test_score_does_not_depend_on_what_was_asked_before(llm: LLM) -> None:
    text = "She loved to play outside in the park"
    (first,) = llm.score([text])
    llm.generate([text], GREEDY)
    assert llm.score([text, "another"])[0].logprobs == pytest.approx(first.logprobs, abs=1e-5)


@pytest.mark.parametrize("prompts", [["ok", [5]], [[]]])
def test_text_too_short_to_be_scored_is_refused(llm: LLM, prompts: list[str | list[int]]) -> None:
    with pytest.raises(RequestError, match="a token, and one before it"):
        llm.score(prompts)
    assert not llm.engine.has_work


def test_vectors_are_the_pooled_hidden_states(llm: LLM) -> None:
    text = "One day she saw a big dog"
    hidden = final_hidden(llm, llm.tokenizer.encode(text))
    for pooling, wanted in (("mean", hidden.mean(0)), ("last", hidden[-1])):
        (vector,) = llm.embed([text], pooling=pooling, normalize=False)
        assert vector == pytest.approx(wanted.tolist(), abs=1e-5)
        (unit,) = llm.embed([text], pooling=pooling)
        length = float((wanted**2).sum() ** 0.5)
        assert unit == pytest.approx([value / length for value in wanted.tolist()], abs=1e-5)


def test_unknown_pooling_is_refused(llm: LLM) -> None:
    with pytest.raises(ConfigError, match="mean or last"):
        llm.embed(["a"], pooling="sum")


def test_prompt_logprobs_come_with_the_completion(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=2, prompt_logprobs=1)
    (completion,) = llm.generate(["One day she"], params)
    assert len(completion.prompt_logprobs) == len(completion.prompt_token_ids) - 1
    assert all(len(entry.top) == 1 for entry in completion.prompt_logprobs)


def test_equal_beginnings_are_computed_once(llm: LLM) -> None:
    prompt = [7, 8, 9] * 12
    llm.generate([prompt], GREEDY)
    (again,) = llm.generate([prompt], GREEDY)
    assert again.num_cached_tokens == len(prompt) - 1


def test_adapter_is_chosen_by_name_and_an_unknown_one_refused(llm: LLM, tmp_path: Path) -> None:
    folder = llm.checkpoint.path
    save_adapter(tmp_path / "lora", random_adapter(llm.checkpoint.config, "lora"))
    with LLM(folder, adapters={"lora": tmp_path / "lora"}) as adapted:
        base, other = (
            adapted.generate(["Once"], GREEDY, adapter=name)[0] for name in (None, "lora")
        )
        assert base.text == llm.generate(["Once"], GREEDY)[0].text != other.text
        with pytest.raises(RequestError, match="loaded: lora"):
            adapted.generate(["Once"], GREEDY, adapter="none")


def test_recorded_run_plays_again_with_the_model(llm: LLM, tmp_path: Path) -> None:
    log = tmp_path / "steps.jsonl"
    with LLM(llm.checkpoint.path, record=log, deterministic=True, max_num_seqs=2) as recorded:
        recorded.generate(["Once", "One day", "She"], SamplingParams(max_tokens=8, seed=1))
    assert replay(log).difference is None
    runner = load_runner("torch", llm.checkpoint, deterministic=True)
    report = replay(log, runner)
    assert report.difference is None
    assert report.num_requests == 3


def next_logprobs(llm: LLM, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        model = load_model(llm.checkpoint)
        return model(torch.tensor([ids]))[0].log_softmax(-1)


def final_hidden(llm: LLM, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        model = load_model(llm.checkpoint)
        attend = CausalAttention(llm.checkpoint.config)
        return model.hidden(torch.tensor([ids]), torch.arange(len(ids)), attend)[0]
