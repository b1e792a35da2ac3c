"""Jinja for chat templates: the same environment as transformers', within a budget.

In: a template's text. Out: the template, compiled so that every loop iteration, call, operator,
filter and new value is charged to the budget of the rendering in progress.
"""

import functools
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from ivl_jax.data.template_budget import (
    Budget,
    ChatTemplateError,
    TemplateLimitError,
    current_budget,
    spending,
)
from ivl_jax.data.template_operations import (
    LEFT_OUT,
    bounded_filters,
    bounded_tests,
    check_method,
    check_operator,
    check_text_format,
)

_TEMPLATE_CHARACTERS = 64_000  # the longest templates of published models have 20,000
_UNBOUNDED_METHODS: Mapping[type, tuple[str, ...]] = {
    str: ("encode", "maketrans", "translate"),
    int: ("from_bytes", "to_bytes"),
}
_PRINTED = (str, int, float, list, tuple, dict, range, Namespace, jinja2.Undefined)


class Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`: marks the assistant's part."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Any) -> nodes.Node:
        """Parses the block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        text = caller()
        rendering = current_budget()
        if isinstance(rendering, Rendering):
            rendering.marked.append((rendering.written, text))
        return text


class Rendering(Budget):
    """One rendering in progress.

    Attributes:
        written: Characters written so far, at the template's top level.
        marked: Parts that the template marked: where each begins, and its text.
    """

    def __init__(self, *, messages: int, characters: int):
        super().__init__(messages=messages, characters=characters)
        self.written = 0
        self.marked: list[tuple[int, str]] = []


class _ChargingCodeGenerator(CodeGenerator):
    """Adds the charges to the template's code."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        node.body.insert(0, nodes.ExprStmt(_charge()).set_lineno(node.lineno))
        if node.test is not None:  # items that it filters out never reach the body
            node.test = nodes.And(_charge(), node.test)
        super().visit_For(node, frame)

    def macro_body(self, node: Any, frame: Frame) -> Any:
        node.body.insert(0, nodes.ExprStmt(_charge()).set_lineno(node.lineno))
        return super().macro_body(node, frame)

    def visit_Output(self, node: nodes.Output, frame: Frame) -> None:
        texts = [part.data for part in node.nodes if isinstance(part, nodes.TemplateData)]
        if texts:
            charge = _charge(sum(map(len, texts)))
            self.visit(nodes.ExprStmt(charge).set_lineno(node.lineno), frame)
        super().visit_Output(node, frame)

    def visit_Call(self, node: nodes.Call, frame: Frame, forward_caller: bool = False) -> None:
        if not isinstance(node.node, nodes.EnvironmentAttribute):
            super().visit_Call(node, frame, forward_caller=forward_caller)
            return
        self.visit(node.node, frame)
        self.write("(")
        for argument in node.args:
            self.visit(argument, frame)
        self.write(")")

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self._measured(super().visit_Concat, node, frame)

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._measured(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._measured(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self._measured(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def _measured(self, visit: Callable[..., None], node: nodes.Node, frame: Frame) -> None:
        self.write("environment.measured(")
        visit(node, frame)
        self.write(")")


class ChatTemplateEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox for chat templates: like transformers', but with limits."""

    code_generator_class = _ChargingCodeGenerator
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[Generation, jinja2.ext.loopcontrols],
            optimized=False,  # compute nothing at compile time
            finalize=_printed,
        )
        self.filters = dict(bounded_filters())
        self.tests = dict(bounded_tests())
        self.globals = {
            name: value for name, value in self.globals.items() if name not in LEFT_OUT
        } | {"dict": _Dict(), "namespace": _Namespace, "raise_exception": _raise_exception}

    def charge(self, characters: int) -> bool:
        """Charges a loop iteration, the body of a macro, or a text between tags."""
        current_budget().write(characters)
        return True

    def measured(self, value: Any) -> Any:
        """Charges a value that the template has made."""
        current_budget().measure(value)
        return value

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Applies an operator, checked and charged."""
        budget = current_budget()
        check_operator(budget, operator, left, right)
        result = super().call_binop(context, operator, left, right)
        budget.measure(result)
        return result

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls a function, method or macro, checked and charged."""
        budget = current_budget()
        if isinstance(__obj, types.BuiltinMethodType):
            args = check_method(budget, __obj.__self__, __obj.__name__, args)
            budget.spend()
            result = super().call(__context, __obj, *args, **kwargs)
        else:
            budget.enter()
            try:
                result = super().call(__context, __obj, *args, **kwargs)
            finally:
                budget.leave()
        budget.measure(result)
        return result

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether a template may read an attribute."""
        unbounded = any(
            isinstance(obj, kind) and attr in names for kind, names in _UNBOUNDED_METHODS.items()
        )
        return not unbounded and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Checks `format` and `format_map` of texts more strictly than Jinja's sandbox."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        @functools.wraps(wrapped)
        def checked(*arguments: Any, **named: Any) -> str:
            check_text_format(current_budget(), value.__self__, arguments, named)
            return wrapped(*arguments, **named)

        return checked


@functools.lru_cache(maxsize=64)
def compile_template(text: str) -> jinja2.Template:
    """Compiles a chat template.

    Raises:
        ChatTemplateError: It is not Jinja, or longer than any template should be.
    """
    if len(text) > _TEMPLATE_CHARACTERS:
        raise TemplateLimitError(
            f"has {len(text):,} characters, more than the allowed {_TEMPLATE_CHARACTERS:,}"
        )
    try:
        with spending(Budget(messages=0, characters=0)):
            return ChatTemplateEnvironment().from_string(text)
    except jinja2.TemplateSyntaxError as error:
        reason = " ".join(str(error.message).split())
        raise ChatTemplateError(f"{reason} (line {error.lineno} of the template)") from error
    except (RecursionError, MemoryError) as error:
        raise TemplateLimitError("is nested too deeply") from error
    except Exception as error:  # Python's errors in the code, such as an integer too long
        raise ChatTemplateError(f"cannot be compiled: {' '.join(str(error).split())}") from error


class _Dict:
    """`dict` in a template: Python's, without its internals."""

    def __call__(self, *arguments: Any, **named: Any) -> dict[Any, Any]:
        return dict(*arguments, **named)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _Namespace(Namespace):
    """`namespace` in a template: names that begin with an underscore are refused."""

    def __init__(self, /, *arguments: Any, **named: Any) -> None:
        attributes = dict(*arguments, **named)
        for name in attributes:
            _check_name(name)
        super().__init__(attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(
            f"{name!r}: an attribute of a namespace must not begin with an underscore"
        )


def _raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


@jinja2.pass_context  # so that nothing is evaluated at compile time
def _printed(context: Any, value: Any) -> Any:
    """What `{{ value }}` writes, charged."""
    budget = current_budget()
    if type(value) is str:
        budget.write(len(value))
        return value
    if value is not None and not isinstance(value, _PRINTED):
        # Its text would contain a memory address, which differs in every run.
        raise jinja2.TemplateError(f"writes a {type(value).__name__}, which is not text")
    budget.write(budget.measure(value))
    return value


def _charge(characters: int = 0) -> nodes.Call:
    """The expression that charges for a loop iteration or for text between tags."""
    charge = nodes.EnvironmentAttribute("charge")
    return nodes.Call(charge, [nodes.Const(characters)], [], None, None)
