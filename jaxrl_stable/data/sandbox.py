"""Chat templates are programs from outside, in Jinja: they run in a sandbox, and not for ever."""

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

# What one rendering may do; the templates of today's models stay far below.
MAX_STEPS = 100_000  # turns of loops, calls of macros
MAX_PRODUCT = 100_000  # length of a repeated text or list, bits of an integer

_STEPS: contextvars.ContextVar[int] = contextvars.ContextVar("steps")


def compile_template(source: str) -> None:
    """Checks that a template can be rendered at all; raises ValueError with the line if not."""
    _compiled(source)


def render_template(source: str, variables: Mapping[str, Any]) -> str:
    """Renders a chat template as transformers does: the same sandbox, filters and functions.

    It reaches neither Python's internals nor files. Loops and products are bounded by `MAX_STEPS`
    and `MAX_PRODUCT`; what else could waste time or memory (padding a text to a gigabyte) is not.

    Raises:
      ValueError: the template is no Jinja, raises, fails, or exceeds the limits; one line.
    """
    template = _compiled(source)
    _STEPS.set(0)
    try:
        return template.render(variables)
    except Exception as error:  # it may fail in any way
        raise ValueError(f"the chat template fails: {_reason(error)}") from None


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    try:
        return _environment().from_string(source)
    except Exception as error:  # of Jinja's parser, or of Python's on deeply nested code
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
        # Neither the class of dictionaries nor a namespace that can pose as something of Python's.
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),
        "namespace": _Namespace,
    }
    del environment.globals["lipsum"]  # filler text of any length
    return environment


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which also counts.

    Jinja itself ends each `range` at 100,000; but loops stand within loops, and `9 ** 999999999` is
    short.
    """

    intercepted_binops = frozenset(["*", "**"])

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        repeatable = (nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block)
        for node in list(tree.find_all(repeatable)):
            # Part of the environment, so that no `set` of the template can replace it.
            step = nodes.Call(nodes.EnvironmentAttribute("step"), [], [], None, None)
            if isinstance(node, nodes.For) and node.test is not None:
                node.test = nodes.And(step, node.test)  # what the test drops counts too
            else:
                node.body.insert(0, nodes.ExprStmt(step, lineno=node.lineno))
        return tree

    def step(self) -> bool:
        """Counts one turn of a loop or one call."""
        _STEPS.set(_STEPS.get() + 1)
        if _STEPS.get() > MAX_STEPS:
            raise jinja2.sandbox.SecurityError(f"it takes more than {MAX_STEPS:,} steps")
        return True

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if _product_size(operator, left, right) > MAX_PRODUCT:
            raise jinja2.sandbox.SecurityError(f"the result of a {operator} is too large")
        return super().call_binop(context, operator, left, right)


def _product_size(operator: str, left: Any, right: Any) -> int:
    """Length of a repeated sequence, or bits of a product or power of integers; 0 of the rest."""
    for sequence, times in ((left, right), (right, left)):
        if hasattr(sequence, "__len__") and isinstance(times, int):
            return len(sequence) * times
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length()
        return bits + right.bit_length() if operator == "*" else bits * abs(right)
    return 0


class _Namespace(jinja2.utils.Namespace):
    """As in transformers: without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any):
        self, *args = args  # so that a template may store a `self`
        jinja2.utils.Namespace.__init__(self)
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.sandbox.SecurityError(f"a namespace takes no name like {name!r}")
        jinja2.utils.Namespace.__setitem__(self, name, value)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` encloses what the assistant says; it leaves the text as it is."""

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
    # Jinja's own filter escapes for HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
