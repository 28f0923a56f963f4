"""Names of blocks: equal where keys and values are equal, different where anything differs."""

from __future__ import annotations

from llmserve.engine.block_keys import BlockKeys, root_key
from support.engines import make_request

BLOCK = 4


def keys_of(prompt: list[int], **changes: object) -> BlockKeys:
    request = make_request("r", prompt, **changes)
    return BlockKeys(root_key("model", request), request, list(prompt), BLOCK)


def test_equal_beginnings_have_equal_keys_and_differ_from_where_tokens_do() -> None:
    one = keys_of([1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 9]).full(3)
    two = keys_of([1, 2, 3, 4, 5, 6, 7, 0, 9, 9, 9, 9]).full(3)
    assert one[0] == two[0]
    assert one[1] != two[1]
    assert one[2] != two[2]  # the same tokens after another past


def test_every_part_of_the_root_matters() -> None:
    request = make_request("r", [1])
    roots = {
        root_key("model", request),
        root_key("other", request),
        root_key("model", make_request("r", [1], adapter="a")),
        root_key("model", make_request("r", [1], adapter="")),
        root_key("model", make_request("r", [1], cache_salt="a")),
        root_key("model", request, is_private=True),
        root_key("model", make_request("s", [1]), is_private=True),
    }
    assert len(roots) == 7
    assert root_key("model", request) == root_key("model", make_request("s", [2]))


def test_parts_of_the_root_cannot_be_shifted_into_each_other() -> None:
    one = root_key("m", make_request("r", [1], adapter="ab", cache_salt="c"))
    two = root_key("m", make_request("r", [1], adapter="a", cache_salt="bc"))
    assert one != two


def test_prompt_end_has_a_key_only_within_a_block() -> None:
    assert keys_of([1, 2, 3, 4]).prompt_end() is None
    one, two = keys_of([1, 2, 3, 4, 5]), keys_of([1, 2, 3, 4, 6])
    assert one.prompt_end() == keys_of([1, 2, 3, 4, 5]).prompt_end()
    assert one.prompt_end() != two.prompt_end()
    assert keys_of([5]).prompt_end() not in (None, *keys_of([5, 0, 0, 0]).full(1))


def test_keys_follow_the_growing_list_of_tokens() -> None:
    request = make_request("r", [1, 2, 3])
    token_ids = [1, 2, 3]
    keys = BlockKeys(root_key("model", request), request, token_ids, BLOCK)
    token_ids += [4, 5, 6, 7, 8]
    assert keys.full(2) == keys_of([1, 2, 3, 4, 5, 6, 7, 8]).full(2)


def test_given_names_stand_for_the_prompts_blocks_alone() -> None:
    given = keys_of([0] * 6, block_keys=[7, 8])
    same = keys_of([1] * 6, block_keys=[7, 8])
    other = keys_of([0] * 6, block_keys=[7, 9])
    assert given.full(1) == same.full(1) == other.full(1)
    assert given.prompt_end() == same.prompt_end()
    assert given.prompt_end() != other.prompt_end()
