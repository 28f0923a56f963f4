"""The offline API: texts in, texts out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from llmserve.engine.request import FinishReason
from llmserve.errors import ConfigError, RequestError
from llmserve.llm import LLM
from llmserve.sampling import SamplingParams
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
