"""Stop strings and held-back text, against a search in the whole text."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve.engine.request import FinishReason, RequestOutput
from llmserve.output import OutputProcessor
from llmserve.runners.protocol import TokenLogprobs
from llmserve.sampling import SamplingParams
from llmserve.text.detokenizer import Detokenizer
from llmserve.text.tokenizer import Tokenizer
from support.texts import all_tokenizers

# Few letters, so that stop strings overlap themselves and each other.
texts = st.text("ab é😀\ufffd", max_size=30)
stop_lists = st.lists(st.text("ab é😀\ufffd", min_size=1, max_size=4), max_size=4)


def first_stop(text: str, stops: list[str]) -> tuple[int, str] | None:
    """Where the stop string that is complete first ends; the longest of several."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return end, max(found, key=len)
    return None


def tokens_until(tokenizer: Tokenizer, ids: list[int], num_chars: int) -> int:
    """How many of `ids` it takes until that many characters are settled."""
    stream, settled = Detokenizer(tokenizer), 0
    for count, token_id in enumerate(ids, start=1):
        settled += len(stream.push(token_id))
        if settled >= num_chars:
            return count
    return len(ids)


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_streamed_text_ends_where_the_whole_text_would(data: st.DataObject) -> None:
    tokenizer = data.draw(st.sampled_from(all_tokenizers()))
    ids = tokenizer.encode(data.draw(texts), add_special_tokens=False)
    ids += data.draw(st.lists(st.integers(0, tokenizer.vocab_size), max_size=6))
    stops = data.draw(stop_lists)
    include_stop = data.draw(st.booleans())
    params = SamplingParams(stop=tuple(stops), include_stop=include_stop, logprobs=0)

    whole = tokenizer.decode(ids)
    found = first_stop(whole, stops)
    expected, num_tokens = whole, len(ids)
    if found is not None:
        stop_end, stop = found
        expected = whole[: stop_end if include_stop else stop_end - len(stop)]
        num_tokens = tokens_until(tokenizer, ids, stop_end)

    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=len(ids))))
    processor = OutputProcessor(tokenizer, params)
    deltas = []
    ends: list[int | None] = [*cuts, None]
    for begin, end in zip([0, *cuts], ends, strict=True):
        output = RequestOutput(
            request_id="r",
            choice_index=0,
            token_ids=ids[begin:end],
            logprobs=[TokenLogprobs(-float(token_id), ()) for token_id in ids[begin:end]],
            finish_reason=FinishReason.LENGTH if end is None else None,
        )
        deltas.append(processor.push(output))
        assert expected.startswith(processor.text), "nothing is shown that is taken back"

    assert processor.text == "".join(delta.text for delta in deltas) == expected
    assert processor.num_tokens == num_tokens
    assert [token for delta in deltas for token in delta.token_ids] == ids[:num_tokens]
    assert [-entry.logprob for delta in deltas for entry in delta.logprobs] == ids[:num_tokens]
    assert processor.stopped == (found is not None)
    [last] = [delta for delta in deltas if delta.finish_reason is not None]
    assert last.finish_reason == (FinishReason.STOP if found else FinishReason.LENGTH)
    assert last.stop_reason == (found[1] if found else None)
