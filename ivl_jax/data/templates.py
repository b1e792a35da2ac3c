"""The named chat templates, as Jinja text with the assistant's part marked.

In: a template's name and a tokenizer. Out: the template, and the texts of the special tokens it
uses, also for a tokenizer that lacks some of them.
"""

import logging
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

_LOGGER = logging.getLogger(__name__)

# Rendering must not depend on the date: Llama 3's own templates default to this one.
PINNED_DATE = datetime(2024, 7, 26, tzinfo=UTC)
_DIRECTIVES = "aAbBcdDeFHIjmMnpSTuUVwWxXyYZ"

_PLAIN = """\
{{- begin }}
{%- for message in messages %}
{%- set content = message['content'] | trim %}
{%- if message['role'] == 'system' %}{{ content + '\\n\\n' }}
{%- elif message['role'] == 'user' %}{{ 'Question: ' + content + '\\n' }}
{%- else %}{{ 'Answer:' }}{% generation %}{{ ' ' + content + eos_token }}{% endgeneration %}
{%- if not loop.last %}{{ '\\n' }}{% endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Answer:' }}{% endif %}"""

# Source: facebookresearch/llama, llama/generation.py (chat_completion): every pair begins anew.
_LLAMA_2 = """\
{%- set ns = namespace(system='') %}
{%- for message in messages %}
{%- set content = message['content'] | trim %}
{%- if message['role'] == 'system' %}
{%- set ns.system = '<<SYS>>\\n' + content + '\\n<</SYS>>\\n\\n' %}
{%- elif message['role'] == 'user' %}{{ begin + '[INST] ' + ns.system + content + ' [/INST]' }}
{%- set ns.system = '' %}
{%- else %}{% generation %}{{ ' ' + content + ' ' + eos_token }}{% endgeneration %}
{%- endif %}
{%- endfor %}"""

# Source: meta-llama/llama-models, models/llama3/chat_format.py.
_LLAMA_3 = """\
{{- begin }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{ message['content'] | trim + end_of_turn }}{% endgeneration %}
{%- else %}{{ message['content'] | trim + end_of_turn }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

# Source: openai/openai-python, chatml.md.
_CHATML = """\
{{- begin }}
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{ message['content'] + end_of_turn }}{% endgeneration %}
{%- else %}{{ message['content'] + end_of_turn }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# Source: lm-sys/FastChat, fastchat/conversation.py, vicuna_v1.1.
_VICUNA = """\
{{- begin }}
{%- if messages[0]['role'] == 'system' %}{{ messages[0]['content'] | trim + ' ' }}
{%- else %}{{ "A chat between a curious user and an artificial intelligence assistant. The \
assistant gives helpful, detailed, and polite answers to the user's questions. " }}
{%- endif %}
{%- for message in messages %}
{%- set content = message['content'] | trim %}
{%- if message['role'] == 'user' %}{{ 'USER: ' + content + ' ' }}
{%- elif message['role'] == 'assistant' %}{{ 'ASSISTANT:' }}
{%- generation %}{{ ' ' + content + eos_token }}{% endgeneration %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""


class NamedTemplate(NamedTuple):
    """A named chat template."""

    text: str  # Jinja, over messages, add_generation_prompt, begin, eos_token and end_of_turn
    markers: tuple[str, ...]  # tokens that it expects in the vocabulary
    end_of_turn: str  # one of them, or "" if the end-of-sequence token ends a turn


NAMED_TEMPLATES: Mapping[str, NamedTemplate] = {
    "plain": NamedTemplate(_PLAIN, markers=(), end_of_turn=""),
    "llama-2": NamedTemplate(_LLAMA_2, markers=(), end_of_turn=""),
    "llama-3": NamedTemplate(
        _LLAMA_3,
        markers=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        end_of_turn="<|eot_id|>",
    ),
    "chatml": NamedTemplate(
        _CHATML, markers=("<|im_start|>", "<|im_end|>"), end_of_turn="<|im_end|>"
    ),
    "vicuna": NamedTemplate(_VICUNA, markers=(), end_of_turn=""),
}


def named_template_variables(tokenizer: Any, name: str) -> dict[str, str]:
    """Returns the special tokens' texts that a named template renders for a tokenizer.

    Args:
        tokenizer: A transformers tokenizer.
        name: A key of `NAMED_TEMPLATES`. A marker that is not in the vocabulary becomes ordinary
            text, with a warning; a missing end-of-turn marker is replaced by the end-of-sequence
            token, so that a turn always ends with one token.

    Returns:
        `begin`, empty if the tokenizer adds no begin-of-text token; `eos_token`; and `end_of_turn`.

    Raises:
        ValueError: The tokenizer has no end-of-sequence token and the template needs it.
    """
    template = NAMED_TEMPLATES[name]
    vocabulary = tokenizer.get_vocab()
    missing = [marker for marker in template.markers if marker not in vocabulary]
    if missing:
        _LOGGER.warning(
            "chat template %s: the tokenizer has no token %s; such markers become ordinary text "
            "and turns end with %r; the template plain suits this tokenizer better",
            name,
            ", ".join(missing),
            template.end_of_turn if template.end_of_turn in vocabulary else tokenizer.eos_token,
        )
    end_of_turn = template.end_of_turn if template.end_of_turn in vocabulary else ""
    if not end_of_turn and tokenizer.eos_token is None:
        raise ValueError(
            f"chat template {name}: an assistant's turn must end with a special token, but the "
            "tokenizer has no end-of-sequence token; set eos_token in tokenizer_config.json"
        )
    begins = tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
    return {
        "begin": tokenizer.bos_token if begins else "",
        "eos_token": tokenizer.eos_token or "",
        "end_of_turn": end_of_turn or tokenizer.eos_token,
    }


def standalone_template(tokenizer: Any, template: str) -> str | None:
    """A chat template as Jinja text that works without this package.

    Args:
        tokenizer: The tokenizer that it is for.
        template: A key of `NAMED_TEMPLATES`, `auto`, `tokenizer` or Jinja text.

    Returns:
        The value for `tokenizer.chat_template` with which `apply_chat_template` renders the same
        prompts; None if the tokenizer already has its own.

    Raises:
        ValueError: As `named_template_variables`.
    """
    if template == "tokenizer" or (template == "auto" and tokenizer.chat_template):
        return None
    name = "plain" if template == "auto" else template
    if name not in NAMED_TEMPLATES:
        return pin_date(template, PINNED_DATE)
    variables = named_template_variables(tokenizer, name)
    settings = "".join(f"{{%- set {key} = {value!r} %}}\n" for key, value in variables.items())
    return settings + NAMED_TEMPLATES[name].text


def pin_date(template: str, date: datetime) -> str:
    """Returns a template that renders `date` wherever it would render today's.

    Args:
        template: Jinja text; it may call `strftime_now(…)` with a literal or a computed format.
        date: The date to render.
    """
    if "strftime_now" not in template:
        return template
    uses = re.sub(r"strftime_now\s+is\b", "", template).count("strftime_now")
    formats = re.findall(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)", template)
    if len(formats) == uses:
        dates = {written: date.strftime(written) for _, written in formats}
        written = f"{dates!r}[f]"
    else:  # for a fixed date, every directive is a fixed text
        directives = {f"%{flag}{name}" for flag in ("-", "") for name in _DIRECTIVES}
        texts = {name: date.strftime(name) for name in sorted(directives)}
        fills = "".join(f" | replace({name!r}, {text!r})" for name, text in texts.items())
        written = f"f | replace('%%', '\\x00'){fills} | replace('\\x00', '%')"
    # A macro of the same name hides the function; the + keeps the line break after the tag.
    return f"{{% macro strftime_now(f) -%}}{{{{- {written} -}}}}{{%- endmacro +%}}{template}"
