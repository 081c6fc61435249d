"""What a chat template, an untrusted program, may and may not do."""

import threading
import time

import jinja2
import pytest

from jaxrl_stable.data.sandbox import MAX_STEPS, render_template


class Canary:
    """An object whose underscore method a template must not reach."""

    _name = "found"


@pytest.mark.fast
@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__.os.system('exit') }}",
        "{{ ([] | attr('__class__')).__base__ }}",
        "{{ []['__class__'].__base__ }}",
        "{{ '{0.__class__.__mro__}'.format('').__class__ }}",
        "{{ self._TemplateReference__context.environment }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__code__.co_consts }}",
        "{{ canary._name.upper() }}",
        "{{ dict.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{% include '/etc/hostname' %}",
        "{% import 'os' as os %}",
        "{% set ns = namespace(__call__=1) %}",
        "{% set ns = namespace() %}{% set ns.__html__ = 1 %}",
        "{{ lipsum(n=1000000) }}",
    ],
)
def test_no_way_out(source):
    given = {"messages": [{"role": "user"}], "canary": Canary()}
    with pytest.raises(ValueError, match="the chat template fails: ") as caught:
        render_template(source, given)
    assert "FOUND" not in str(caught.value)
    assert given["messages"] == [{"role": "user"}]


LOOP = "{% for j in range(3000) %}"


@pytest.mark.fast
@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        (f"{LOOP}{LOOP}{{% endfor %}}{{% endfor %}}", "more than 100,000 steps"),
        # The body of the inner loop never runs, so it cannot count.
        (f"{LOOP}{LOOP[:-3]} if false %}}{{% endfor %}}{{% endfor %}}", "more than 100,000 steps"),
        (
            "{% macro f(n) %}{{ f(n-1) ~ f(n-1) if n }}{% endmacro %}{{ f(40) }}",
            "more than 100,000 steps",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% block a %}{{ self.a() }}{% endblock %}", "recursion"),
        ("{{ 9 ** 3000000 }}", r"the result of a \*\* is too large"),
        ("{{ 'x' * 10**9 }}", r"the result of a \* is too large"),
        ("{{ 10**9 * [0] }}", r"the result of a \* is too large"),
        (
            "{% set n = namespace(i=3) %}{% for j in range(99) %}{% set n.i = n.i * n.i %}"
            "{% endfor %}",
            r"the result of a \* is too large",
        ),
        # A name that the template assigns does not disable the counter.
        (f"{{% set step = 1 %}}{LOOP}{LOOP}{{% endfor %}}{{% endfor %}}", "more than 100,000"),
    ],
)
def test_not_for_ever(source, reason):
    start = time.perf_counter()
    with pytest.raises(ValueError, match=f"the chat template fails: .*{reason}") as caught:
        render_template(source, {})
    assert "\n" not in str(caught.value)
    assert time.perf_counter() - start < 10


def test_the_count_is_of_one_rendering_in_one_thread():
    source = "{% for i in range(" + str(int(MAX_STEPS * 0.6)) + ") %}{% endfor %}done"
    texts = []
    threads = [
        threading.Thread(target=lambda: texts.append(render_template(source, {}))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts + [render_template(source, {}) for _ in range(3)] == ["done"] * 6


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ messages[0 }}", r"not valid Jinja \(line 1\): "),
        ("\n{% endfor %}", r"not valid Jinja \(line 2\): "),
        ("{{" + "(" * 3000 + "1" + ")" * 3000 + "}}", "not valid Jinja.*: .*recursion"),
        ("{{ raise_exception('one\n two') }}", "fails: one two$"),
        ("{{ nobody.name }}", "fails: 'nobody' is undefined$"),
        ("{{ 1 / 0 }}", "fails: division by zero$"),
    ],
)
def test_faults_are_one_line(source, message):
    with pytest.raises(ValueError, match=message) as caught:
        render_template(source, {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (
            "{% for i in range(5) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}",
            "0234",
        ),
        ("{% for i in range(5) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        (
            "{% for i in range(6) if i % 2 %}{{ i }}{{ ', ' if not loop.last }}{% endfor %}",
            "1, 3, 5",
        ),
        ("{% for i in [] %}{% else %}none{% endfor %}", "none"),
        ("{% for x in t recursive %}{{ x[0] }}{{ loop(x[1:]) }}{% endfor %}", "abc"),
        (
            "{% macro f(x) %}<{{ x }}{{ caller() }}>{% endmacro %}{% call f(1) %}2{% endcall %}",
            "<12>",
        ),
        ("{% generation %}said{% endgeneration %}.", "said."),
        ("  {% if true %}\n  a\n  {% endif %}\n", "  a\n"),
        ('{{ {"b": "<é>", "a": none} | tojson }}', '{"b": "<é>", "a": null}'),
        (
            '{{ {"b": 1, "a": [2]} | tojson(sort_keys=true, separators=(",", ":")) }}',
            '{"a":[2],"b":1}',
        ),
        ("{{ dict(a=1).items() | list }}", "[('a', 1)]"),
        ("{% set ns = namespace(self=1) %}{% set ns.b = 2 %}{{ ns.self + ns.b }}", "3"),
        (
            "{{ '=' * 3 }}{{ 2 ** 10 }}{{ 1.5 * 2 }}{{ 2 ** -1 }}{{ [1] * 2 }}",
            "===10243.00.5[1, 1]",
        ),
        ("{{ strftime_now('%%') }}{{ absent }}{{ '<b>' }}", "%<b>"),
    ],
)
def test_what_templates_use(source, text):
    assert render_template(source, {"t": [["a", ["b", ["c"]]]]}) == text


def test_jinja_is_new_enough_to_hold():
    assert tuple(map(int, jinja2.__version__.split(".")[:3])) >= (3, 1, 6)
