"""The matrix of situations: an answer depends on its request alone.

{alone, with 1, 4, 15, 63 others} x {whole, chunked} x {cold, prefix hit} x {ample, starved cache}
x {streamed, not} x {greedy, seeded} x guesses {off, on, switching, from a draft model}.
The native runner's ids and logprobs are equal bit for bit, as are those of the torch runner's
deterministic mode; in its default mode ids are equal except where rounding decides between two
tokens.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmserve.completion import Completion
from llmserve.export.quantize import Scheme
from llmserve.native.kernels import available_paths
from llmserve.sampling import SamplingParams
from support.exactness import (
    NEIGHBOURS,
    NUM_TOKENS,
    SEED,
    Situation,
    answer_in,
    first_difference,
    is_close_call,
)
from support.models import make_model_folder
from support.quantized_folders import write_quantized

ALONE = Situation(1, False, False, False, False, "off")
CLOSE = {"float32": 1e-4, "bfloat16": 0.05}
"""Gap of two logits, and distance of a uniform number, at which rounding may decide."""

SITUATIONS = st.builds(
    Situation,
    batch_size=st.sampled_from([1, 2, 5, 16, 64]),
    is_chunked=st.booleans(),
    is_hit=st.booleans(),
    is_starved=st.booleans(),
    is_streamed=st.booleans(),
    speculation=st.sampled_from(["off", "on", "switching", "draft"]),
)
# Repeats itself, so that there is something to guess; longer than three blocks.
PROMPT = [5, 9, 14, 30, 31, 32] * 9

ANY = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    made = {
        "model": make_model_folder(root / "model"),
        "draft": make_model_folder(root / "draft", seed=1),
    }
    schemes: tuple[Scheme, ...] = ("int4", "int8")
    for scheme in schemes:
        made[scheme] = root / scheme
        write_quantized(made["model"], made[scheme], scheme, 8)
    return made


def params_for(temperature: float, num_top: int) -> SamplingParams:
    return SamplingParams(
        max_tokens=NUM_TOKENS,
        temperature=temperature,
        seed=SEED,
        ignore_eos=True,
        logprobs=num_top,
    )


@pytest.fixture(scope="module")
def references(folders: dict[str, Path]) -> dict[tuple[str, float, bool], Completion]:
    """The answer of a request alone, by dtype, temperature and mode."""
    return {
        (dtype, temperature, mode): answer_in(
            ALONE,
            folders["model"],
            folders["draft"],
            PROMPT,
            params_for(temperature, 320),
            runner="torch",
            dtype=dtype,
            deterministic=mode,
        )[0]
        for dtype in CLOSE
        for temperature in (0.0, 1.0)
        for mode in (True, False)
    }


@ANY
@given(SITUATIONS, st.sampled_from([0.0, 1.0]), st.sampled_from(sorted(CLOSE)))
def test_deterministic_mode_gives_the_same_bits(
    folders: dict[str, Path],
    references: dict[tuple[str, float, bool], Completion],
    situation: Situation,
    temperature: float,
    dtype: str,
) -> None:
    params = params_for(temperature, 320)
    found, _ = answer_in(
        situation,
        folders["model"],
        folders["draft"],
        PROMPT,
        params,
        runner="torch",
        dtype=dtype,
        deterministic=True,
    )
    assert found.choices == references[dtype, temperature, True].choices


NATIVE_FORMS = [("model", "float32"), ("model", "bfloat16"), ("int4", None), ("int8", None)]
"""Folder, and type of what it does not quantize."""


@pytest.fixture(scope="module")
def native_references(
    folders: dict[str, Path],
) -> dict[tuple[tuple[str, str | None], float], Completion]:
    """The answer of a request alone on the native runner, by form and temperature."""
    return {
        (form, temperature): answer_in(
            ALONE,
            folders[form[0]],
            folders["draft"],
            PROMPT,
            params_for(temperature, 320),
            runner="native",
            dtype=form[1],
        )[0]
        for form in NATIVE_FORMS
        for temperature in (0.0, 1.0)
    }


@pytest.mark.native
@pytest.mark.skipif(not available_paths(), reason="the kernels are not built here")
@settings(parent=ANY, max_examples=60)
@given(SITUATIONS, st.sampled_from([0.0, 1.0]), st.sampled_from(NATIVE_FORMS))
def test_native_runner_gives_the_same_bits(
    folders: dict[str, Path],
    native_references: dict[tuple[tuple[str, str | None], float], Completion],
    situation: Situation,
    temperature: float,
    form: tuple[str, str | None],
) -> None:
    found, _ = answer_in(
        situation,
        folders[form[0]],
        folders["draft"],
        PROMPT,
        params_for(temperature, 320),
        runner="native",
        dtype=form[1],
    )
    assert found.choices == native_references[form, temperature].choices


@ANY
@given(SITUATIONS, st.sampled_from([0.0, 1.0]), st.sampled_from(sorted(CLOSE)))
def test_default_mode_gives_the_same_ids_but_for_close_calls(
    folders: dict[str, Path],
    references: dict[tuple[str, float, bool], Completion],
    situation: Situation,
    temperature: float,
    dtype: str,
) -> None:
    params = params_for(temperature, 0)
    found, _ = answer_in(
        situation,
        folders["model"],
        folders["draft"],
        PROMPT,
        params,
        runner="torch",
        dtype=dtype,
        deterministic=False,
    )
    reference = references[dtype, temperature, False]
    place = first_difference(reference.choices[0].token_ids, found.choices[0].token_ids)
    assert place is None or is_close_call(reference, place, params, CLOSE[dtype])


@pytest.mark.parametrize("deterministic", [True, False])
def test_starved_situation_preempts(folders: dict[str, Path], deterministic: bool) -> None:
    """The matrix would prove little if nobody had to give way."""
    situation = Situation(64, False, False, True, False, "off")
    _, num_preemptions = answer_in(
        situation,
        folders["model"],
        folders["draft"],
        PROMPT,
        params_for(0.0, 0),
        runner="torch",
        dtype="float32",
        deterministic=deterministic,
    )
    assert len(NEIGHBOURS) == 63
    assert num_preemptions > 0
