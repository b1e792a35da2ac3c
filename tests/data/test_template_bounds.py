"""No chat template hangs, fills the memory or ends in a traceback; and each renders as before."""

import threading
import time
from typing import Any

import jinja2.filters
import pytest
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from ivl_jax.data import template_budget
from ivl_jax.data.chat import ChatTemplateError, make_chat_format
from ivl_jax.data.demonstrations import Demonstration, MalformedRowsError
from ivl_jax.data.formats import Message
from ivl_jax.data.rendering import TemplateLimitError, render
from ivl_jax.data.template_environment import ChatTemplateEnvironment
from ivl_jax.data.template_operations import LEFT_OUT
from ivl_jax.data.tokenized import tokenize_demonstrations

DIALOGUE = (Message("user", "Hi"), Message("assistant", "Yo"))
LOOP = "{% for i in range(60) %}"

BOMBS = [
    "{% for i in range(10**9) %}a{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{{ range(99999)|sum }}{% endfor %}",
    "{% for i in range(99999) %}{% if range(99999)|select('eq', -1)|list %}{% endif %}{% endfor %}",
    "{% for i in range(99999) %}{% set x %}{% for m in range(2) %}aaaaaaaa{% endfor %}{% endset %}"
    "{% endfor %}",
    "{{ 'a' * 10**11 }}",
    "{{ 10**11 * 'a' }}",
    "{{ [1] * 10**11 }}",
    "{{ 'a'|center(10000000000) }}",
    "{{ 'a'.ljust(10**10) }}",
    "{{ 'a'.zfill(10**10) }}",
    "{{ '\t'.expandtabs(10**10) }}",
    "{{ ('a\n'*100000)|indent(100000) }}",
    "{{ ('a'*100000)|replace('a', 'a'*100000) }}",
    "{{ ('a'*100000).replace('', 'a'*100000) }}",
    "{{ ('a'*100000).join('b'*100000) }}",
    "{{ ('b'*100000)|join('a'*100000) }}",
    "{{ ('b'*100000)|map('center', 100000)|join }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '%(a)s%(a)s' * 1000 % {'a': 'b'*200000} }}",
    "{{ '%1000000000d'|format(1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 1000000000) }}",
    "{{ ('{0}'*10000).format('a'*100000) }}",
    "{{ ('{a}'*10000).format_map({'a': 'a'*100000}) }}",
    "{{ 10**(10**8) }}",
    f"{{% set ns = namespace(n=3) %}}{LOOP}{{% set ns.n = ns.n * ns.n %}}{{% endfor %}}",
    f"{{% set ns = namespace(s='a') %}}{LOOP}{{% set ns.s = ns.s ~ ns.s %}}{{% endfor %}}",
    f"{{% set ns = namespace(s='a') %}}{LOOP}{{% set ns.s = ns.s + ns.s %}}{{% endfor %}}",
    f"{{% set ns = namespace(s='a') %}}{LOOP}{{% set ns.s = [ns.s, ns.s]|join %}}{{% endfor %}}",
    f"{{% set ns = namespace(l=[1]) %}}{LOOP}{{% set ns.l = [ns.l, ns.l] %}}{{% endfor %}}",
    f"{{% set ns = namespace(l=1) %}}{LOOP}{{% set ns.l = {{1: ns.l, 2: ns.l}} %}}{{% endfor %}}",
    f"{{% set ns = namespace(l=1) %}}{LOOP}{{% set ns.l = dict(a=ns.l, b=ns.l) %}}{{% endfor %}}",
    f"{{% set n = namespace(l=1) %}}{LOOP}{{% set n.l = namespace(a=n.l, b=n.l) %}}{{% endfor %}}",
    "{% set ns = namespace(l=1) %}{% set ns.l = ns %}{{ ns }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "{% macro f() %}{{ caller() }}{% endmacro %}{% macro g() %}{% call f() %}{{ g() }}"
    "{% endcall %}{% endmacro %}{{ g() }}",
    "{% for x in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "{% block a %}{{ self.a() }}{% endblock %}",
    "{{ []|slice(10**9)|list }}",
    "{{ [1]|batch(1000000000, 1)|list }}",
    "{{ 1.5|round(1000000000, 'ceil') }}",
    "{{ ([[1]]*100000)|sum(start=[])|length }}",
    "{{ ([[1]]*50000)|tojson(indent=10000) }}",
    "{{ ('a'*200000).strip('b'*200000) }}",
    "{{ ('f'*200000)|int(0, 16) }}",
    "{{" + "(" * 5000 + "1" + ")" * 5000 + "}}",
    "{{ 1" + "+1" * 20000 + " }}",
    "x" * 300_000,
]
FAILURES = [
    ("{{ 1 / 0 }}", "division by zero (line 1 of the template)"),
    ("a\n{{ 1 % 0 }}", "modulo by zero (line 2 of the template)"),
    ("{{ messages[10]['role'] }}", "list object has no element 10"),
    ("{{ none + 'a' }}", "TypeError: unsupported operand"),
    ("{{ raise_exception('no\nway') }}", "no way"),
    ("{% if %}", "Expected an expression, got 'end of statement block' (line 1 of"),
    ("{{ ''|urlize }}", "No filter named 'urlize'"),
    ("{{ 'a'|random }}", "No filter named 'random'"),
    ("{{ lipsum() }}", "'lipsum' is undefined"),
    ("{{ (5).to_bytes(10**10, 'little') }}", "'to_bytes' of 'int' object is unsafe"),
    ("{{ 'a'.encode() }}", "'encode' of 'str' object is unsafe"),
    ("{{ 'a'.translate({97: 'b'}) }}", "'translate' of 'str' object is unsafe"),
    ("{{ ''.__class__.__mro__ }}", "'__class__' of 'str' object is unsafe"),
    ("{{ namespace(__init__=1) }}", "must not begin with an underscore"),
    ("{% include 'x' %}", "no loader for this environment"),
    ("{{ " + "9" * 5000 + " }}", "cannot be compiled: Exceeds the limit"),
    ("{% for i in x %}" * 30 + "{% endfor %}" * 30, "too many statically nested blocks"),
    ("{{ messages[0].content.strip }}", "writes a builtin_function_or_method, which is not text"),
    ("{{ range(3)|map('string') }}", "writes a generator, which is not text"),
    ("{{ '\\ud800' }}", "a lone surrogate"),
]


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes counted bounds count: checked types make every step several times as long."""
    monkeypatch.setattr(template_budget, "_SECONDS", 600.0)
    monkeypatch.setattr(template_budget, "_STEPS", 1_000)


@pytest.mark.parametrize("template", BOMBS)
def test_a_template_that_would_take_all_time_or_memory_ends_early(
    byte_tokenizer: Any, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if template != BOMBS[1]:  # which runs into the clock as it is set: 0.8 s
        monkeypatch.setattr(template_budget, "_SECONDS", 0.1)
    given = template + "{# {{ #}"  # so that it counts as a template and not as a name
    start = time.thread_time()  # of this thread: whatever else runs beside it
    with pytest.raises(ChatTemplateError) as caught:
        make_chat_format(byte_tokenizer, template=given)
    assert time.thread_time() - start < 10  # seconds; about one on an idle core
    message = str(caught.value)
    assert message.startswith("chat template given as Jinja text: ")
    assert "\n" not in message
    assert len(message) < 500


@pytest.mark.parametrize(("template", "reason"), FAILURES)
def test_a_template_that_fails_is_named_on_one_line(
    byte_tokenizer: Any, template: str, reason: str
) -> None:
    for given in (template, "tokenizer"):
        byte_tokenizer.chat_template = template
        try:
            with pytest.raises(ChatTemplateError) as caught:
                make_chat_format(byte_tokenizer, template=given if "{" in given else "tokenizer")
        finally:
            byte_tokenizer.chat_template = None
        message = str(caught.value)
        name = "of the tokenizer" if given == "tokenizer" else "given as Jinja text"
        assert message.startswith(f"chat template {name}: ")
        assert reason in message
        assert "\n" not in message
        assert not isinstance(caught.value, TemplateLimitError)


@pytest.mark.usefixtures("few_steps")
def test_bounds_hold_in_other_threads_and_each_has_its_own_budget() -> None:
    template = "{% for i in range(400) %}a{% endfor %}"
    found: list[Any] = []

    def work() -> None:
        try:
            found.append(len(render(template, {}, DIALOGUE, prompt=False)[0]))
            render(BOMBS[1], {}, DIALOGUE, prompt=False)
        except Exception as error:
            found.append(type(error))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(str, found)) == sorted(map(str, [400, TemplateLimitError] * 2))


@pytest.mark.usefixtures("few_steps")
def test_a_template_that_exceeds_its_limits_on_every_row_stops_the_run_at_once(
    byte_tokenizer: Any,
) -> None:
    template = "{% if messages[0]['content'] != 'Hello!' %}" + BOMBS[1] + "{% endif %}"
    template += "{% for m in messages %}{{ m['content'] + '<eos>' }}{% endfor %}"
    chat = make_chat_format(byte_tokenizer, template=template)
    rows = [Demonstration(DIALOGUE, f"a.jsonl:{line}") for line in range(1, 100)]
    within = chat.encode_dialogues([DIALOGUE] * 20, beyond_limits_at_most=3)
    assert [type(one) for one in within] == [TemplateLimitError] * 4
    with pytest.raises(MalformedRowsError, match=r"a\.jsonl:4: chat template .* more steps"):
        tokenize_demonstrations(rows, chat, sequence_length=64, cache_dir=None)


@pytest.mark.usefixtures("few_steps")
def test_long_dialogues_are_within_bounds() -> None:
    looks_back = (
        "{% for m in messages %}{% for n in messages %}{% if n is mapping %}{% endif %}"
        "{% endfor %}{{ m.role ~ ': ' ~ m.content | trim ~ '\n' }}{% endfor %}"
    )
    many = [Message(("user", "assistant")[turn % 2], f"{turn} ") for turn in range(80)]
    text, _ = render(looks_back, {}, many, prompt=False)
    assert text.endswith("assistant: 79\n")
    gathers = (
        "{% set ns = namespace(text='') %}{% for m in messages %}"
        "{% set ns.text = ns.text + m.content.replace('b', 'bb') %}{% endfor %}{{ ns.text|upper }}"
    )
    long = [Message("user", "ab" * 300_000), Message("assistant", "é" * 300_000)]
    text, _ = render(gathers, {}, long, prompt=False)
    assert text == "ABB" * 300_000 + "É" * 300_000


def test_templates_have_what_transformers_gives_them_but_what_is_left_out() -> None:
    ours, theirs = ChatTemplateEnvironment(), _compile_jinja_template("x").environment
    assert set(ours.filters) == set(theirs.filters) - set(LEFT_OUT)
    assert set(ours.tests) == set(theirs.tests)
    # The date is pinned in the template itself.
    assert set(ours.globals) == set(theirs.globals) - set(LEFT_OUT) - {"strftime_now"}
    names = ("trim_blocks", "lstrip_blocks", "keep_trailing_newline", "autoescape", "undefined")
    assert all(getattr(ours, name) == getattr(theirs, name) for name in names)
    assert set(jinja2.filters.FILTERS) > set(LEFT_OUT) - {"lipsum"}


RENDERED = [
    "{{ [1.5, 2]|tojson }} {{ {'b': 'é<', 'a': [none, true]}|tojson(indent=2) }}",
    "{{ {'b': 1, 'a': 2}|tojson(separators=(',', ':'), sort_keys=true, ensure_ascii=true) }}",
    "{{ ('<b>' | e) + '<' }} {{ '<i>' | safe }} {{ ['<', '>' | e] | join('&') }}",
    "{{ 'a,b' .split(',') | map('upper') | join('-') }} {{ ', '.join(['x', 'y']) }}",
    "{{ '%s is %5.1f' % ('x', 2) }} {{ '%s' | format('y') }} {{ '{0:>4}|{a}'.format('z', a=1) }}",
    "{{ messages | selectattr('role', 'eq', 'user') | map(attribute='content') | list }}",
    "{% for m in messages if m.role == 'user' %}{{ loop.index }}/{{ loop.length }}{% endfor %}",
    "{% for k, v in {'a': 1, 'b': 2} | dictsort %}{{ k ~ v }}{{ loop.last }}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 2 ** 3 %}{% endfor %}"
    "{{ ns.n }}",
    "{% macro say(m, end='!') %}{{ m.content }}{{ end }}{% endmacro %}"
    "{{ say(messages[0]) }}{{ say(messages[-1], end='') }}",
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}"
    "{{ m }}{% break %}{% endfor %}",
    "{% set a, b = (1, [2, 3]) %}{{ a }}{{ b[0] }}{{ (a, b) }}{{ range(3)|list }}{{ 7 // 2 % 4 }}",
    "{% filter upper %}{% for m in messages %} {{ m.role }}{% endfor %}{% endfilter %}{{ none_ }}",
    "{% set text %}  {{ messages[0].content | indent(2) }}{% endset %}"
    "{{ text | trim | replace('H', 'J') }}",
    "{{ dict(a=1).get('a') }}{{ 'abc'[1:] }}{{ 'x' * 3 }}",
    "{% if tools is none and documents is none and not add_generation_prompt %}none{% endif %}",
    "{{ bos_token }}{% for group in [1, 2, 3] | batch(2) %}{{ group }}{% endfor %}{{ 'ß'|upper }}",
    "{% block a %}{{ 'x' }}{% endblock %}{{ joiner(', ')() }}{{ cycler(1, 2).next() }}",
]


@pytest.mark.parametrize("template", RENDERED)
def test_what_stays_within_bounds_renders_as_transformers_renders_it(template: str) -> None:
    dialogue = [Message("user", "Hi\nthere"), Message("assistant", "Yo"), Message("user", "é")]
    (expected,), _ = render_jinja_template(
        [[message._asdict() for message in dialogue]], chat_template=template, bos_token="<s>"
    )
    assert render(template, {"bos_token": "<s>"}, dialogue, prompt=False)[0] == expected


def test_marks_whose_place_is_not_known_are_refused() -> None:
    inside = (
        "{% macro turn(m) %}{{ m.role }}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% endmacro %}{% for m in messages %}{{ turn(m) }}{% endfor %}"
    )
    assert render(inside, {}, DIALOGUE, prompt=False)[0] == "userHiassistantYo"
    with pytest.raises(ChatTemplateError, match="inside a macro or a set block"):
        render(inside, {}, DIALOGUE, prompt=False, marks=True)
