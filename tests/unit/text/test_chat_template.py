"""Renderings equal those of transformers; models without a template; limits and errors."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

import pytest

from llmserve.errors import TemplateError
from llmserve.limits import Limits
from llmserve.text.chat_template import ChatTemplate
from llmserve.text.tokenizer import Tokenizer
from support.texts import trained

CHATML = """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\n' }}
{% endif %}
"""
INST = """{%- if messages[0].role == 'system' -%}
    {%- set system = '<<SYS>>\n' ~ messages[0].content | trim ~ '\n<</SYS>>\n\n' -%}
    {%- set rest = messages[1:] -%}
{%- else -%}
    {%- set system, rest = '', messages -%}
{%- endif -%}
{%- for message in rest -%}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('roles must alternate user/assistant, got ' ~ message.role) }}
    {%- endif -%}
    {%- if message.role == 'user' -%}
        {{ bos_token + '[INST] ' + (system if loop.first else '') + message.content + ' [/INST]' }}
    {%- else -%}
        {{ ' ' + message.content.strip() + ' ' + eos_token }}
    {%- endif -%}
{%- endfor -%}
"""
TOOLS = """{%- macro describe(value, depth=0) -%}
  {%- if value is mapping -%}
    {{- '{' -}}
    {%- for key, item in value | dictsort -%}
      {{- key | upper }}={{ describe(item, depth + 1) }}{{ ', ' if not loop.last }}
    {%- endfor -%}
    {{- '}' -}}
  {%- elif value is string -%}<|"|>{{ value }}<|"|>
  {%- elif value is sequence -%}{{ value | map('string') | join('|') }}
  {%- else -%}{{ value }}{%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
Today is {{ strftime_now('%d %b %Y') }}.
{% if tools is not none %}
{%- for tool in tools %}
{{ tool | tojson(indent=2) }}
{{ describe(tool.function) }}
{%- endfor %}
{% endif %}
{%- set ns = namespace(last=-1, text='', kept=[]) %}
{%- for message in messages %}
  {%- if message.role == 'system' %}{% continue %}{% endif %}
  {%- if message.role == 'stop' %}{% break %}{% endif %}
  {%- set ns.last = loop.index0 %}
  {%- set ns.kept = ns.kept + [message] %}
  {%- for part in message.content.split('</think>') %}{% set ns.text = ns.text ~ part %}{% endfor %}
{%- endfor %}
{%- for message in ns.kept | selectattr('role', 'equalto', 'user') | list %}
[{{ loop.index }}/{{ ns.last }}] {{ message.content | trim | replace('\t', ' ') | tojson }}
{%- set captured %}<{{ message.role | capitalize }}>{% endset %}
{{ captured }} {{ '%s:%02d' % (message.role, loop.index) }} {{ '{}!'.format(message.role) }}
{%- generation %} marked{% endgeneration %}
{%- endfor %}
{{ ns.text | length }}{{ undefined_name }}{{ messages | length > 1 and 'many' or 'one' }}
{%- if enable_thinking is defined and enable_thinking %}<think>{% endif %}
"""
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TEMPLATES = {"chatml": CHATML, "inst": INST, "tools": TOOLS}
TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"a": [1, 2], "é": {"x": None, "y": True}}},
}
USER = {"role": "user", "content": " What is\t<2> & 'é' 😀?\n"}
CHATS: list[list[dict[str, Any]]] = [
    [USER],
    [{"role": "system", "content": "Be brief. "}, USER],
    [USER, {"role": "assistant", "content": "<think>a</think>4 "}, USER],
    [USER, {"role": "assistant", "content": "{{ 7 * 7 }}{% raw %}"}, {**USER, "content": ""}],
]
VARIABLES: list[dict[str, Any]] = [{}, {"tools": [TOOL]}, {"enable_thinking": True}]


def oracle(source: str, messages: list[dict[str, Any]], **variables: Any) -> str:
    chat = pytest.importorskip("transformers.utils.chat_template_utils")
    rendered, _ = chat.render_jinja_template(
        [messages], chat_template=source, **SPECIAL, **variables
    )
    return str(rendered[0])


@pytest.mark.parametrize("variables", VARIABLES, ids=["plain", "tools", "thinking"])
@pytest.mark.parametrize("chat", range(len(CHATS)))
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_rendering_equals_transformers(
    name: str, chat: int, prompt: bool, variables: dict[str, Any]
) -> None:
    template = ChatTemplate(TEMPLATES[name], special_tokens=SPECIAL)
    rendered = template.render(CHATS[chat], add_generation_prompt=prompt, **variables)
    assert rendered == oracle(
        TEMPLATES[name], CHATS[chat], add_generation_prompt=prompt, **variables
    )


def test_refusal_of_the_template_reaches_the_client() -> None:
    template = ChatTemplate(INST, special_tokens=SPECIAL)
    with pytest.raises(
        TemplateError, match=r"refuses the messages: roles must .* got user"
    ) as error:
        template.render([USER, USER])
    assert error.value.param == "messages"


def test_failure_of_the_template_says_why() -> None:
    with pytest.raises(TemplateError, match="the chat template failed: 'nothing' is undefined"):
        ChatTemplate("{{ nothing.at.all }}").render([USER])


def test_clock_is_the_one_given() -> None:
    template = ChatTemplate("{{ strftime_now('%Y-%m-%d') }}", now=lambda: datetime(2024, 2, 29))
    assert template.render([]) == "2024-02-29"


def test_variables_cannot_replace_the_messages() -> None:
    template = ChatTemplate("{{ messages | length }}{{ name }}")
    assert template.render([USER], name="x") == "1x"
    with pytest.raises(TypeError):
        template.render([USER], messages=[])  # type: ignore[misc]


@pytest.mark.parametrize("num_chars", [10, 11])
def test_rendering_is_bounded_by_the_limit(num_chars: int) -> None:
    template = ChatTemplate("{{ messages[0].content }}", limits=Limits(max_rendered_chars=10))
    messages = [{"role": "user", "content": "x" * num_chars}]
    if num_chars == 10:
        assert template.render(messages) == "x" * 10
    else:
        with pytest.raises(TemplateError, match="more than 10 characters"):
            template.render(messages)


def test_source_is_bounded_by_the_limit() -> None:
    limits = Limits(max_template_bytes=4)
    assert ChatTemplate("éé", limits=limits).render([]) == "éé"
    with pytest.raises(TemplateError, match="5 bytes; at most 4"):
        ChatTemplate("ééx", limits=limits)


def test_long_conversation_fits() -> None:
    messages = [USER, {"role": "assistant", "content": "x" * 900}] * 512
    text = ChatTemplate(CHATML).render(messages)
    assert text.count("<|im_start|>") == 1025


def test_threads_may_share_a_template() -> None:
    template = ChatTemplate(CHATML)
    chats = [[{"role": "user", "content": str(index) * 100}] for index in range(40)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(template.render, chats)) == [template.render(chat) for chat in chats]


def test_model_without_template_says_what_to_do() -> None:
    with pytest.raises(TemplateError, match="--chat-template") as error:
        ChatTemplate.for_tokenizer(trained("bpe"))
    assert error.value.param == "messages"


def test_template_of_a_model_knows_its_special_tokens() -> None:
    files = trained("bpe").files()
    tokenizer = Tokenizer(
        files["tokenizer.json"],
        {"bos_token": "<|endoftext|>"},
        chat_template="{{ bos_token }}{{ messages[0].content }}",
    )
    template = ChatTemplate.for_tokenizer(tokenizer)
    ids = tokenizer.encode(template.render([{"content": "names"}]), add_special_tokens=False)
    assert ids == tokenizer.encode("names")
    given = ChatTemplate.for_tokenizer(tokenizer, source="{{ bos_token }}!")
    assert given.render([]) == "<|endoftext|>!"
    assert ChatTemplate.for_tokenizer(tokenizer) is template
