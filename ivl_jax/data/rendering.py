"""Renders a dialogue with a Jinja chat template, like transformers, but within bounds.

In: a template's text, its variables, messages. Out: the text and the assistant's parts in it; or a
one-line error within a second, whatever the template does.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from ivl_jax.data.formats import Message
from ivl_jax.data.template_budget import ChatTemplateError, TemplateLimitError, spending
from ivl_jax.data.template_environment import Rendering, compile_template

__all__ = ["ChatTemplateError", "TemplateLimitError", "render"]

_MESSAGE_CHARACTERS = 300  # of a template's or Python's error message


def render(
    text: str,
    variables: Mapping[str, Any],
    messages: Sequence[Message],
    *,
    prompt: bool,
    marks: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    """Renders a dialogue.

    Args:
        text: The template, Jinja text.
        variables: The template's variables besides the messages.
        messages: Turns in order.
        prompt: Whether to begin the assistant's turn at the end.
        marks: Whether the template marks the assistant's parts.

    Returns:
        The text, and the marked parts, in characters.

    Raises:
        ChatTemplateError: The template refuses the dialogue or fails on it.
        TemplateLimitError: It needs more steps, memory or time than any dialogue should.

    Source: `render_jinja_template` of transformers, whose sandbox has none of these limits.
    """
    template = compile_template(text)
    rendering = Rendering(
        messages=len(messages),
        characters=len(text) + sum(len(message.content) for message in messages),
    )
    try:
        with spending(rendering):
            pieces = []
            for piece in template.generate(
                messages=[{"role": turn.role, "content": turn.content} for turn in messages],
                tools=None,
                documents=None,
                add_generation_prompt=prompt,
                **variables,
            ):
                pieces.append(piece)
                rendering.written += len(piece)
    except TemplateLimitError:
        raise
    except (RecursionError, MemoryError) as error:
        raise TemplateLimitError("recurses without end, or needs too much memory") from error
    except Exception as error:  # a template's code may raise anything
        raise ChatTemplateError(_reason(error)) from error
    rendered = "".join(pieces)
    try:
        rendered.encode()
    except UnicodeEncodeError as error:
        reason = "writes a lone surrogate, which is not a character"
        raise ChatTemplateError(reason) from error
    return rendered, _spans(rendered, rendering.marked) if marks else []


def _spans(text: str, marked: Sequence[tuple[int, str]]) -> list[tuple[int, int]]:
    """The positions of the marked texts; an error if they are not known."""
    spans = [(start, start + len(part)) for start, part in marked]
    for (start, end), (_, part) in zip(spans, marked, strict=True):
        if text[start:end] != part:
            raise ChatTemplateError(
                "marks with {% generation %} inside a macro or a set block: the position of the "
                "marked text is not known; move the marks out of it"
            )
    return spans


def _reason(error: Exception) -> str:
    """The error on one line, with its line in the template."""
    message = " ".join(str(error).split()) or type(error).__name__
    if len(message) > _MESSAGE_CHARACTERS:
        message = f"{message[:_MESSAGE_CHARACTERS]}…"
    if not isinstance(error, jinja2.TemplateError | ArithmeticError):
        message = f"{type(error).__name__}: {message}"
    line, trace = 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return f"{message} (line {line} of the template)" if line else message
