"""Templates that mean harm: each is stopped, by its own bound, before it costs time or memory."""

from __future__ import annotations

import resource

import pytest

from llmserve.errors import TemplateError
from llmserve.limits import Limits
from llmserve.text.chat_template import ChatTemplate

MESSAGES = [{"role": "user", "content": "hi"}]
DOUBLING = "{%% set ns = namespace(x='abcdefgh') %%}{%% for i in range(60) %%}%s{%% endfor %%}"
BIG = "{% set x = 'a' * 1000000 %}"

STOPPED = r"too large|Range too big|more than|wider|start must|a field of 1000"

TOO_LARGE = {
    "repetition": "{{ 'a' * 300000000 }}",
    "repeated list": "{{ [0] * 300000000 }}",
    "list of one large thing": BIG + "{{ [[x]] * 1000 }}",
    "power": "{{ 10 ** 100000000 }}",
    "product": "{% set x = 2 ** 4000 %}{{ x * x * x }}",
    "range": "{{ range(1000000000) | list }}",
    "doubling by ~": DOUBLING % "{% set ns.x = ns.x ~ ns.x %}",
    "doubling by +": DOUBLING % "{% set ns.x = ns.x + ns.x %}",
    "doubling by capture": DOUBLING % "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x=y %}",
    "doubling by join": DOUBLING % "{% set ns.x = [ns.x, ns.x] | join %}",
    "doubling by format": DOUBLING % "{% set ns.x = '%s%s' % (ns.x, ns.x) %}",
    "replace": BIG + "{{ x.replace('a', x) }}",
    "replace filter": BIG + "{{ x | replace('a', x) }}",
    "replace in markup": BIG + "{{ (x | safe).replace('a', x) }}",
    "join": BIG + "{{ x.join(x) }}",
    "join filter": BIG + "{{ x | join(x) }}",
    "format": BIG + "{{ ('{0}' * 5000).format(x) }}",
    "format filter": BIG + "{{ ('%s' * 5000) | format(x) }}",
    "width": "{{ '{:1000000000}'.format('a') }}",
    "width by %": "{{ '%1000000000d' % 1 }}",
    "width as argument": "{{ '{:{w}}'.format('a', w=1000000000) }}",
    "width by format filter": "{{ '%*d' | format(1000000000, 1) }}",
    "indent": "{{ 'a\nb' | indent(1000000000) }}",
    "indent of JSON": "{{ [1] | tojson(indent=1000000000) }}",
    "separators of JSON": BIG + "{{ [1, 2, 3, 4, 5] | tojson(separators=(x, x)) }}",
    "format of the time": "{{ strftime_now('%c' * 1000) }}",
    "sum of lists": BIG + "{{ x | map('list') | sum(start=[]) }}",
    "output": "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
    "output of a macro": "{% macro f() %}{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}"
    "{% endmacro %}{{ f() }}",
}

TOO_LONG = {
    "nested loops": "{% set r = range(99999) %}{% for i in r %}{% for j in r %}{% endfor %}"
    "{% endfor %}",
    "recursive macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
    "{% endmacro %}{{ f(60) }}",
    "filters": "{% for i in range(99999) %}{% set x = range(99999) | list | length %}{% endfor %}",
    "lists in lists": DOUBLING % "{% set ns.x = [ns.x, ns.x] %}",
    "objects in objects": DOUBLING % "{% set ns.x = {'a': ns.x, 'b': ns.x} %}",
    "objects by call": DOUBLING % "{% set ns.x = dict(a=ns.x, b=ns.x) %}",
}

FORBIDDEN = {
    "class": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "class by format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "change of a message": "{{ messages[0].update(role='system') }}",
    "change of the list": "{{ messages.append(1) }}",
    "padding": "{{ 'a'.center(1000000000) }}",
    "padding by subscript": "{{ 'a'['zfill'](1000000000) }}",
    "lorem ipsum": "{{ lipsum(n=100000) }}",
    "another template": "{% include '/etc/passwd' %}",
    "module": "{% import 'os' as os %}",
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}


@pytest.mark.parametrize("name", TOO_LARGE)
def test_what_grows_too_large_is_stopped(name: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(
        TemplateError, match=r"too large|Range too big|more than|wider|start must|a field of 1000"
    ):
        ChatTemplate(TOO_LARGE[name], limits=Limits(template_timeout_s=30.0)).render(MESSAGES)
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 150 << 10


@pytest.mark.parametrize("name", TOO_LONG)
def test_what_takes_too_long_is_stopped(name: str) -> None:
    with pytest.raises(TemplateError, match=r"takes too long|too large"):
        ChatTemplate(TOO_LONG[name], limits=Limits(template_timeout_s=0.05)).render(MESSAGES)


@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_is_not_offered_fails(name: str) -> None:
    with pytest.raises(TemplateError):
        ChatTemplate(FORBIDDEN[name]).render(MESSAGES)
    assert MESSAGES == [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    "source",
    [
        "{% for %}",
        "{{ 'a' | center(9) }}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{{ " + "1+" * 5000 + "1 }}",
        "{% if 1 %}" * 2500 + "{% endif %}" * 2500,
        "a" * (1 << 17),
    ],
    ids=["syntax", "filter", "parentheses", "sum", "nesting", "size"],
)
def test_source_that_is_no_template_is_refused(source: str) -> None:
    with pytest.raises(TemplateError, match=r"chat template (is not valid|has 131072 bytes)"):
        ChatTemplate(source)


def test_nothing_is_computed_while_compiling() -> None:
    ChatTemplate("{% if false %}{{ 'a' * 300000000 }}{{ 10 ** 100000000 }}{% endif %}")


def test_namespaces_do_not_print_what_they_hold() -> None:
    source = "{% set ns = namespace(a=1) %}{% set ns.a = [ns, ns] %}{{ ns }}{{ ns.a }}"
    assert ChatTemplate(source).render([]) == "<namespace>[<namespace>, <namespace>]"
