"""Renders a dialogue by a Jinja chat template, as transformers does, within bounds.

In: a template's text, its variables, messages. Out: the text, and where the assistant writes in it;
or an error of one line, within a second, whatever the template does.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from ivl_jax.data.formats import Message
from ivl_jax.data.template_budget import ChatTemplateError, TemplateLimitError, spending
from ivl_jax.data.template_environment import Rendering, compile_template

__all__ = ["ChatTemplateError", "TemplateLimitError", "render"]

_MESSAGE_CHARACTERS = 300  # of what a template or Python says


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
        variables: What the template reads besides the messages.
        messages: Turns in order.
        prompt: Whether the assistant's turn is begun at the end.
        marks: Whether the template marks what the assistant writes.

    Returns:
        The text, and the stretches that are marked, in characters.

    Raises:
        ChatTemplateError: The template refuses the dialogue or fails on it.
        TemplateLimitError: It needs more steps, memory or time than any dialogue should.

    Source: `render_jinja_template` of transformers, whose sandbox bounds neither.
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
        raise TemplateLimitError("calls itself without end, or needs too much memory") from error
    except Exception as error:  # a template's code is foreign: it may raise anything
        raise ChatTemplateError(_reason(error)) from error
    rendered = "".join(pieces)
    try:
        rendered.encode()
    except UnicodeEncodeError as error:
        reason = "writes half of a surrogate pair, which is not a character"
        raise ChatTemplateError(reason) from error
    return rendered, _spans(rendered, rendering.marked) if marks else []


def _spans(text: str, marked: Sequence[tuple[int, str]]) -> list[tuple[int, int]]:
    """Where the marked texts stand; an error where that is not known."""
    spans = [(start, start + len(part)) for start, part in marked]
    for (start, end), (_, part) in zip(spans, marked, strict=True):
        if text[start:end] != part:
            raise ChatTemplateError(
                "marks with {% generation %} inside a macro or a block that is set: where the "
                "marked text stands is not known; move the marks out of it"
            )
    return spans


def _reason(error: Exception) -> str:
    """What went wrong, on one line, and where in the template."""
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
