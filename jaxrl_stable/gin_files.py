"""Gin files in, an `Experiment` out.

The library has no gin decorators. Gin files import modules (dynamic registration) and bind fields,
for example `configs.Objective.replay = "R3"`. Functions are bound by reference and configured where
they are defined: `configs.Objective.loss = @objectives.gspo`, `objectives.gspo.clip_high = 4e-4`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import os
import re
import tokenize
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import gin

from jaxrl_stable import configs

T = TypeVar("T")

# Bindings on the command line may use these names even if the gin files import none of them.
PREAMBLE = (
    "from __gin__ import dynamic_registration",
    "from jaxrl_stable import advantages",
    "from jaxrl_stable import array_tasks",
    "from jaxrl_stable import configs",
    "from jaxrl_stable import corrections",
    "from jaxrl_stable import data",
    "from jaxrl_stable import hf",
    "from jaxrl_stable import objectives",
    "from jaxrl_stable.model import config as model",
    "from jaxrl_stable.study import config as study",
)

# Gin configures only functions that are bound by reference, so the defaults are bound too.
DEFAULTS = (
    "configs.Objective.loss = @objectives.minirl",
    "configs.Objective.advantages = @advantages.centered",
)

FUNCTIONS = ("advantages", "corrections", "objectives")  # bound as @name, other things as @name()

GIN_ERRORS = (
    ValueError,
    TypeError,
    SyntaxError,
    NameError,
    ImportError,
    AttributeError,
    tokenize.TokenError,  # a bracket or quote that is never closed
)
CALLED = re.compile(r"In call to configurable '([^']+)'")
FLAG = "--gin."  # before a binding on the command line
MACRO = "gin.macro"  # the selector of `NAME = value`; the name is its scope


def load_experiment(files: Sequence[str], bindings: Sequence[str] = ()) -> configs.Experiment:
    """Reads gin files and bindings into an `Experiment`; see `load`."""
    return load(files, bindings, build_experiment)


def load(files: Sequence[str], bindings: Sequence[str], build: Callable[[], T]) -> T:
    """Reads gin files and bindings, and builds what they describe, once.

    A binding that nothing reads is refused, except if it was in use until a later file or the
    command line replaced its target.

    Args:
      files: gin files; later ones override earlier ones.
      bindings: lines that override all files.
      build: makes the object from what gin has parsed.

    Returns:
      The result of `build`.

    Raises:
      ValueError: if gin or a config refuses a name, field or value, or if nothing reads a binding.
      FileNotFoundError: if a gin file is missing.
    """
    for path in files:
        if not os.path.exists(path):
            raise FileNotFoundError(f"gin file {path} does not exist; check --gin_file")
    gin.clear_config()
    parsing = ""
    try:
        gin.parse_config([*PREAMBLE, *DEFAULTS])
        tables = [_bindings()]
        for parsing in files:
            gin.parse_config_file(parsing)
            tables.append(_bindings())
        parsing = " ".join(f"{FLAG}{binding}" for binding in bindings)
        gin.parse_config([*PREAMBLE, *bindings])
        tables.append(_bindings())
        gin.finalize()
        built = build()
    except GIN_ERRORS as error:
        raise ValueError(_explained(error, bindings, parsing)) from error
    _refuse_unread(tables)
    return built


def build_experiment() -> configs.Experiment:
    """Builds the experiment that gin has parsed."""
    experiment = configured(configs.Experiment)()
    rl = experiment.reinforcement
    objective = _settled(rl.objective)
    objective.check_options()  # before a call fails with a worse message
    rl.resolved_objective.try_functions()  # calls them through gin, which records what they read
    rl = dataclasses.replace(rl, objective=objective)
    rl.resolved_objective.check()
    return dataclasses.replace(experiment, reinforcement=rl)


def resolved_config() -> str:
    """Returns every binding that was used, defaults included, as gin text."""
    return gin.operative_config_str()


def configured(cls: type) -> Callable:
    """Returns the class as gin configures it, or the class itself if no gin file mentions it."""
    try:
        return gin.get_configurable(cls)
    except ValueError:
        return cls


def settled(function: Callable) -> Callable:
    """Freezes the options that are bound now, so that later gin files cannot change them.

    Args:
      function: a function of an `Objective`, as gin passes it.

    Returns:
      The plain function, as a `functools.partial` if it has options.

    Raises:
      ValueError: if the function has a gin scope.
    """
    # Stops at gin's wrapper: the function inside keeps its own decorators.
    wrapper = inspect.unwrap(function, stop=_is_configurable)
    if not hasattr(wrapper, "__wrapped__"):
        return function
    original = wrapper.__wrapped__
    if function is not wrapper:
        raise ValueError(
            f"@…/{original.__name__} has a scope, which the functions of an Objective do not "
            "take; bind it without one"
        )
    options = gin.get_bindings(function)
    return functools.partial(original, **options) if options else original


def _is_configurable(function: Callable) -> bool:
    """Returns whether a function is gin's wrapper around another function."""
    try:
        return gin.get_configurable(function) is function
    except ValueError:  # unknown to gin
        return False


def one_line(error: Exception) -> str:
    """Returns the message of an error, without gin's "In call to configurable …" suffix."""
    return re.sub(r" In call to configurable .*$", "", " ".join(str(error).split()))


def _explained(error: Exception, bindings: Sequence[str], parsing: str) -> str:
    """Returns the message of an error of gin's, in words that say what to write.

    Args:
      error: raised while gin parsed or built.
      bindings: those of the command line, one per line after `PREAMBLE`.
      parsing: what gin was parsing.
    """
    if isinstance(error, tokenize.TokenError):
        return f"a bracket or quote is never closed in {parsing}; close it"
    text = one_line(error)
    unbound = re.match(r"No bindings specified for '(\S+)/gin\.macro'", text)
    if unbound:
        name = unbound[1]
        return f"the macro {name} is used but not bound; bind it, as in {FLAG}{name}=VALUE"
    text = re.sub(
        r"malformed node or string.*?Failed to parse token '([^']*)'",
        r"the value that starts with \1 is neither a number nor a text in quotes; put texts in "
        "quotes",
        text,
    )
    place = re.search(r"\(line (\d+)\)$", text)
    index = int(place[1]) - 1 - len(PREAMBLE) if place else -1
    if place and 0 <= index < len(bindings):
        name, _, value = (part.strip() for part in bindings[index].partition("="))
        text = text[: place.start()] + f"({FLAG}{bindings[index]})"
        if "put texts in quotes" in text:
            text = (
                f"{name} is bound to {value}, which is neither a number nor a text in quotes; the "
                f"shell removes the outer quotes, so write {FLAG}{name}=\"'{value}'\""
            )
    if isinstance(error, TypeError) and (called := CALLED.search(str(error))):
        text = f"{called[1]}: {text}; check the values that are bound to it"
    return text


def _settled(objective: configs.Objective) -> configs.Objective:
    return dataclasses.replace(
        objective,
        loss=settled(objective.loss),
        advantages=settled(objective.advantages),
        corrections=tuple(map(settled, objective.corrections)),
    )


# --- Unread bindings. Gin has no public view of single bindings, so these functions read the tables
# --- that `gin.config_str` and `gin.operative_config_str` print.


class Binding(NamedTuple):
    """Key of one binding: `scope/selector.name = value`."""

    scope: str
    selector: str
    name: str


def _bindings() -> dict[Binding, Any]:
    """Returns what is bound now."""
    return {
        Binding(scope, selector, name): value
        for (scope, selector), values in gin.config._CONFIG.items()
        for name, value in values.items()
    }


def _read_bindings(bound: dict[Binding, Any]) -> set[Binding]:
    """Returns the bindings that something read."""
    used = gin.config._OPERATIVE_CONFIG.items()
    found = {_resolve(bound, *key, name) for key, values in used for name in values}
    return found - {None}


def _resolve(bound: dict[Binding, Any], scope: str, selector: str, name: str) -> Binding | None:
    """Returns the binding that a use reads: in scope "a/b", the longest of "a/b", "a" and ""."""
    parts = scope.split("/") if scope else []
    scopes = ("/".join(parts[:length]) for length in range(len(parts), -1, -1))
    candidates = (Binding(each, selector, name) for each in scopes)
    return next((each for each in candidates if each in bound), None)


def _refuse_unread(tables: Sequence[dict[Binding, Any]]) -> None:
    """Raises ValueError for a binding that is unused and was never reachable in any earlier file.

    Args:
      tables: what was bound after the defaults, after each file, and after the command line.
    """
    defaults, *_, final = tables
    reachable = [_reachable(table, _roots(final)) for table in tables]
    for binding in sorted(final.keys() - _read_bindings(final)):
        value = final[binding]
        if defaults.get(binding, tables) is value:
            continue
        source = next(i for i, table in enumerate(tables) if table.get(binding, tables) is value)
        before = set().union(*reachable[source:-1])
        if binding in before - reachable[-1]:
            continue
        if binding.selector == MACRO:
            raise ValueError(_unread_macro(binding.scope, final))
        name = binding.selector.removeprefix("jaxrl_stable.")
        call = "" if name.split(".")[0] in FUNCTIONS else "()"
        name = f"{binding.scope}/" * bool(binding.scope) + name
        raise ValueError(
            f"{name}.{binding.name} is bound but nothing uses it; bind @{name}{call} where it "
            "belongs, name the scope that is used, or remove the line"
        )


def _unread_macro(name: str, bound: dict[Binding, Any]) -> str:
    """Returns the message for a macro that nothing reads, with the macros it may have meant."""
    read = sorted({b.scope for b in _read_bindings(bound) if b.selector == MACRO} - {name})
    near = {each.lower(): each for each in read}
    close = difflib.get_close_matches(name.lower(), near, n=3, cutoff=0.6)
    if close:
        advice = f"did you mean {' or '.join(near[each] for each in close)}?"
    elif read:
        advice = f"the macros in use are {', '.join(read)}"
    else:
        advice = "these gin files use no macros; bind a field, such as configs.Experiment.seed"
    return f"the macro {name} is bound but nothing uses it; {advice}"


def _roots(table: dict[Binding, Any]) -> set[str]:
    """Returns the root selectors: used, but referenced by nothing, such as the experiment."""
    referred = {selector for value in table.values() for _, selector in _references(value)}
    return {selector for _, selector in gin.config._OPERATIVE_CONFIG} - referred


def _reachable(table: dict[Binding, Any], roots: set[str]) -> set[Binding]:
    """Returns the bindings that a build from this table would read, by following references."""
    fields: dict[str, set[str]] = {}
    for binding in table:
        fields.setdefault(binding.selector, set()).add(binding.name)
    found, seen, todo = set(), set(), [("", root) for root in roots]
    while todo:
        scope, selector = todo.pop()
        seen.add((scope, selector))
        for name in fields.get(selector, ()):
            binding = _resolve(table, scope, selector, name)
            if binding is not None:
                found.add(binding)
                # A reference without a scope is called in the scope of its caller.
                uses = {(own or scope, used) for own, used in _references(table[binding])}
                todo += uses - seen
    return found


def _references(value: Any) -> Iterator[tuple[str, str]]:
    """Yields scope and selector of each reference (`@name`, `@name()`) in a value, at any depth."""
    if isinstance(value, gin.config.ConfigurableReference):
        yield value.config_key
    elif isinstance(value, dict):
        for each in value.values():
            yield from _references(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _references(each)
