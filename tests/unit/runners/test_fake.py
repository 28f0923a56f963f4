"""The scripted runner: its answers follow from the context, and from nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from llmserve.engine.request import Pooling
from llmserve.runners.fake import Context, FakeRunner, next_token
from llmserve.runners.protocol import CacheGroup
from support.engines import VOCAB, make_engine, make_info, make_request, run, tokens_by_choice

PROMPT = list(range(11))


def test_next_token_is_the_contexts() -> None:
    context = Context(PROMPT[:5], (None, 3))
    for token_id in PROMPT[5:]:
        context.append(token_id)
    assert context.digest() % VOCAB == next_token(PROMPT, VOCAB, None, 3)


@pytest.mark.parametrize("place", [0, 4, 10])
def test_every_token_of_the_past_matters_even_beyond_a_window(place: int) -> None:
    other = [*PROMPT]
    other[place] += 1
    for windows in ((None,), (3,)):
        assert Context(PROMPT, windows).digest() != Context(other, windows).digest()


def test_window_of_one_sees_its_token_alone() -> None:
    assert Context([1, 2, 3], (1,)).digest() == Context([9, 9, 3], (1,)).digest()


def test_adapters_answer_apart() -> None:
    engine = make_engine(FakeRunner(make_info(adapters=("a", "b"))))
    for name in (None, "a", "b"):
        engine.add_request(make_request(str(name), PROMPT, adapter=name, max_tokens=1))
    tokens = tokens_by_choice(run(engine))
    for adapter_id, name in enumerate(("None", "a", "b")):
        assert tokens[name, 0] == [next_token(PROMPT, VOCAB, adapter_id=adapter_id)]


def test_masked_ids_are_not_drawn_and_others_are_followed() -> None:
    engine = make_engine()
    engine.add_request(make_request("allowed", PROMPT, allowed_token_ids=(3, 4), max_tokens=20))
    first = next_token(PROMPT, VOCAB)
    engine.add_request(make_request("banned", PROMPT, banned_token_ids=(first,), max_tokens=1))
    tokens = tokens_by_choice(run(engine))
    assert set(tokens["allowed", 0]) == {3, 4}
    assert tokens["banned", 0] != [first]


def test_vector_is_the_mean_of_the_digits() -> None:
    engine = make_engine()
    engine.add_request(make_request("v", PROMPT, pooling=Pooling.MEAN))
    (output,) = run(engine)
    digests = [Context(PROMPT[: count + 1]).digest() for count in range(len(PROMPT))]
    wanted = [np.mean([digest % base for digest in digests]) for base in (7, 11, 13)]
    assert output.vector == pytest.approx(wanted, rel=1e-6)


def test_two_groups_mix_into_one_answer() -> None:
    groups = tuple(
        CacheGroup(num_layers=1, window=window, bytes_per_token=8) for window in (None, 4)
    )
    engine = make_engine(FakeRunner(make_info(cache_groups=groups)), num_blocks=(64, 64))
    engine.add_request(make_request("a", PROMPT, max_tokens=1))
    assert tokens_by_choice(run(engine))["a", 0] == [next_token(PROMPT, VOCAB, None, 4)]
