"""Renders chat templates in a sandbox, with a limit on their work.

A chat template is an untrusted Jinja program that comes with a checkpoint.
"""

import contextvars
import datetime
import functools
import json
from collections.abc import Mapping
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes

# Limits of one rendering; the templates of current models stay far below them.
MAX_STEPS = 100_000  # loop iterations and macro calls
MAX_PRODUCT = 100_000  # length of a repeated string or list; bits of an integer

_STEPS: contextvars.ContextVar[int] = contextvars.ContextVar("steps")


def compile_template(source: str) -> None:
    """Checks that a template is valid Jinja.

    Raises:
      ValueError: if it is not. The message names the line.
    """
    _compiled(source)


def render_template(source: str, variables: Mapping[str, Any]) -> str:
    """Renders a chat template as transformers does: the same sandbox, filters and functions.

    A template can access neither Python's internals nor files. `MAX_STEPS` and `MAX_PRODUCT` bound
    its loops and products. Other ways to waste time or memory, such as padding a string to a
    gigabyte, are not bounded.

    Raises:
      ValueError: if the template is not valid Jinja, raises an error, or exceeds the limits. The
        message is one line.
    """
    template = _compiled(source)
    _STEPS.set(0)
    try:
        return template.render(variables)
    except Exception as error:  # a template can raise anything
        raise ValueError(f"the chat template fails: {_reason(error)}") from None


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    try:
        return _environment().from_string(source)
    except Exception as error:  # from Jinja's parser, or from Python's if code is deeply nested
        line = getattr(error, "lineno", None)
        where = f" (line {line})" if line else ""
        raise ValueError(f"the chat template is not valid Jinja{where}: {_reason(error)}") from None


@functools.cache
def _environment() -> "_Sandbox":
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        # Not the class `dict` itself, nor a namespace whose names could imitate Python's internals.
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),
        "namespace": _Namespace,
    }
    del environment.globals["lipsum"]  # generates filler text of any length
    return environment


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with a step counter and a limit on products.

    Jinja itself limits each `range` to 100,000 items, but loops can be nested, and
    `9 ** 999999999` is a short expression.
    """

    intercepted_binops = frozenset(["*", "**"])

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        repeatable = (nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block)
        for node in list(tree.find_all(repeatable)):
            # An attribute of the environment, which `set` in the template cannot replace.
            step = nodes.Call(nodes.EnvironmentAttribute("step"), [], [], None, None)
            if isinstance(node, nodes.For) and node.test is not None:
                node.test = nodes.And(step, node.test)  # counts filtered items too
            else:
                node.body.insert(0, nodes.ExprStmt(step, lineno=node.lineno))
        return tree

    def step(self) -> bool:
        """Counts one loop iteration or one call.

        Returns:
          True, so that it can be part of a condition.

        Raises:
          SecurityError: after more than `MAX_STEPS` steps.
        """
        _STEPS.set(_STEPS.get() + 1)
        if _STEPS.get() > MAX_STEPS:
            raise jinja2.sandbox.SecurityError(f"it takes more than {MAX_STEPS:,} steps")
        return True

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if _product_size(operator, left, right) > MAX_PRODUCT:
            raise jinja2.sandbox.SecurityError(f"the result of a {operator} is too large")
        return super().call_binop(context, operator, left, right)


def _product_size(operator: str, left: Any, right: Any) -> int:
    """Returns the length of a repeated sequence or the bits of an integer result, else 0."""
    for sequence, times in ((left, right), (right, left)):
        if hasattr(sequence, "__len__") and isinstance(times, int):
            return len(sequence) * times
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length()
        return bits + right.bit_length() if operator == "*" else bits * abs(right)
    return 0


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without names that start with an underscore, as in transformers."""

    def __init__(*args: Any, **kwargs: Any):
        self, *args = args  # so that a template may store the name `self`
        jinja2.utils.Namespace.__init__(self)
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.sandbox.SecurityError(f"a namespace cannot store {name!r}")
        jinja2.utils.Namespace.__setitem__(self, name, value)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, which marks the assistant's text and leaves it unchanged."""

    tags = frozenset(["generation"])

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

    def _same(self, caller: Any) -> str:
        return caller()


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
