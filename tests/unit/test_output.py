"""How a choice ends, and what comes with which delta; stop strings at large in tests/property."""

from __future__ import annotations

import pytest

from llmserve.engine.request import FinishReason, RequestOutput
from llmserve.output import OutputProcessor, TextDelta
from llmserve.runners.protocol import TokenLogprobs
from llmserve.sampling import SamplingParams
from support.texts import sentencepiece_like, trained

TOKENIZER = trained("char")


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def output(token_ids: list[int], end: FinishReason | None = None, **more: object) -> RequestOutput:
    return RequestOutput(
        request_id="r",
        choice_index=0,
        token_ids=token_ids,
        finish_reason=end,
        **more,  # type: ignore[arg-type]
    )


def process(params: SamplingParams, *outputs: RequestOutput) -> tuple[OutputProcessor, TextDelta]:
    """The processor and its last delta."""
    processor = OutputProcessor(TOKENIZER, params)
    for one in outputs:
        delta = processor.push(one)
    return processor, delta


def test_end_id_of_the_model_has_no_text_and_no_reason() -> None:
    end = output([*ids_of("names"), 0], FinishReason.STOP, stop_token_id=0)
    processor, delta = process(SamplingParams(), end)
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("names", "stop", None)
    assert (processor.num_tokens, processor.stopped) == (6, False)


@pytest.mark.parametrize(("include_stop", "text"), [(False, "name"), (True, "names")])
def test_stop_id_is_shown_on_demand(include_stop: bool, text: str) -> None:
    [s] = ids_of("s")
    params = SamplingParams(stop_token_ids=(s,), include_stop=include_stop)
    end = output(ids_of("names"), FinishReason.STOP, stop_token_id=s)
    processor, delta = process(params, end)
    assert (delta.text, delta.stop_reason, processor.num_tokens) == (text, s, 5)
    assert delta.token_ids == ids_of("names")


def test_stop_string_ends_the_text_before_the_engine_does() -> None:
    params = SamplingParams(stop=("st",))
    processor, delta = process(params, output(ids_of("the li")), output(ids_of("st and")))
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("", "stop", "st")
    assert (processor.text, processor.num_tokens, processor.stopped) == ("the li", 8, True)


def test_outputs_after_the_stop_string_add_nothing() -> None:
    params = SamplingParams(stop=("st",))
    processor, delta = process(
        params, output(ids_of("the list")), output(ids_of(" and"), FinishReason.LENGTH)
    )
    assert delta == TextDelta()
    assert (processor.text, processor.num_tokens) == ("the li", 8)


@pytest.mark.parametrize("reason", list(FinishReason))
def test_text_held_back_comes_with_the_end(reason: FinishReason) -> None:
    params = SamplingParams(stop=("xyz",))
    processor, delta = process(params, output([*ids_of("a"), *ids_of("xy")]), output([], reason))
    assert (delta.text, delta.finish_reason) == ("xy", reason)
    assert processor.text == "axy"


def test_unfinished_character_comes_with_the_end() -> None:
    processor, delta = process(
        SamplingParams(), output(ids_of("a漢")[:3]), output([], FinishReason.LENGTH)
    )
    assert processor.text == "a\ufffd\ufffd"
    assert delta.token_ids == ids_of("漢")[:2]


def test_tokens_come_with_the_text_that_they_complete() -> None:
    logprobs = [TokenLogprobs(-float(index), ()) for index in range(8)]
    processor = OutputProcessor(TOKENIZER, SamplingParams(stop=("sz",), logprobs=0))
    ids = ids_of("es漢s.")
    seen = [
        processor.push(output([token_id], logprobs=[logprobs[index]]))
        for index, token_id in enumerate(ids)
    ]
    assert [delta.text for delta in seen] == ["e", "", "", "", "s漢", "", "s."]
    assert [len(delta.token_ids) for delta in seen] == [1, 0, 0, 0, 4, 0, 2]
    assert [entry for delta in seen for entry in delta.logprobs] == logprobs[:7]


def test_answer_goes_on_where_the_prompt_ends() -> None:
    tokenizer = sentencepiece_like()
    the = tokenizer.encode("the", add_special_tokens=False)
    assert OutputProcessor(tokenizer, SamplingParams(), [1]).push(output(the)).text == "the"
    assert OutputProcessor(tokenizer, SamplingParams(), [1, *the]).push(output(the)).text == " the"
