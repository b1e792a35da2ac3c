"""Renders a dialogue by a Jinja chat template, as transformers does.

In: a template's text, its variables, messages. Out: the text, and where the assistant writes in it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ivl_jax.data.formats import Message


class ChatTemplateError(ValueError):
    """A dialogue that a chat template cannot render in a way that can be learned from."""


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
        ChatTemplateError: The template refuses the dialogue.
    """
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    spans: Any
    try:
        texts, spans = render_jinja_template(
            [[message._asdict() for message in messages]],
            chat_template=text,
            add_generation_prompt=prompt,
            return_assistant_tokens_mask=marks,
            **variables,
        )
    except (TemplateError, TypeError, KeyError) as error:
        raise ChatTemplateError(str(error)) from error
    return texts[0], list(spans[0]) if spans else []
