"""Encodes dialogues as tokens with a loss mask.

In: messages, a tokenizer and a chat template. Out: for training, tokens and which of them the
assistant must produce; for decoding, a prompt's tokens, which are a prefix of the training tokens.
"""

import functools
import hashlib
import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from ivl_jax.data.dialogue_template import PROBE, DialogueTemplate, RenderedDialogue, following
from ivl_jax.data.formats import Message
from ivl_jax.data.pieces import PieceEncoder, PieceTokens
from ivl_jax.data.rendering import ChatTemplateError, TemplateLimitError, render
from ivl_jax.data.templates import (
    NAMED_TEMPLATES,
    PINNED_DATE,
    named_template_variables,
    pin_date,
)

_LOGGER = logging.getLogger(__name__)


class EncodedDialogue(NamedTuple):
    """A tokenised dialogue."""

    tokens: Int32[np.ndarray, "N"]
    loss_mask: Bool[np.ndarray, "N"]  # what the assistant must produce, including the end of turn


class ChatFormat:
    """Renders dialogues with one chat template, in one tokenizer's tokens.

    Made by `make_chat_format`. The text is tokenised in pieces that are cut where an assistant's
    turn begins, so that a prompt's tokens are exactly the first tokens of every dialogue that
    continues it, whatever the tokenizer merges. The loss mask follows from roles only.

    Attributes:
        name: The format's name in messages.
        template: A named template's name or Jinja text; `make_chat_format` gives the same format
            for it.
        stop_ids: The tokens that end an assistant's turn.
        fingerprint: SHA-256 over template and tokenizer; formats with equal ones encode equally.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = ["?", "</s>", "Question:", "Answer:", "2+3?", "5"]
        >>> ids = {word: i for i, word in enumerate(words)}
        >>> backend = Tokenizer(models.WordLevel(ids, unk_token="?"))
        >>> backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
        >>> chat = make_chat_format(tokenizer, template="plain")
        >>> dialogue = [Message("user", "2+3?"), Message("assistant", "5")]
        >>> tokens, loss_mask = chat.encode_dialogue(dialogue)
        >>> " ".join(words[token] for token in tokens)
        'Question: 2+3? Answer: 5 </s>'
        >>> " ".join(words[token] for token in tokens[loss_mask])
        '5 </s>'
        >>> " ".join(words[token] for token in chat.encode_prompt(dialogue[:1]))
        'Question: 2+3? Answer:'
    """

    def __init__(
        self, tokenizer: Any, *, name: str, template: str, text: str, variables: Mapping[str, Any]
    ):
        self.name = name
        self.template = template
        pinned = pin_date(text, PINNED_DATE)
        self._encoder = PieceEncoder(tokenizer)
        self._template = DialogueTemplate(
            name, pinned, variables, encoder=self._encoder, eos=tokenizer.eos_token or ""
        )
        identity = [pinned, dict(variables), self._encoder.definition]
        # A format that encodes as in earlier versions keeps its fingerprint.
        identity += [*self._template.deviations, *self._encoder.deviations]
        self.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        self.stop_ids = self._find_stop_ids(tokenizer.eos_token_id)

    def encode_dialogue(self, messages: Sequence[Message]) -> EncodedDialogue:
        """Encodes a dialogue for training.

        Args:
            messages: Turns in order; the assistant's are the targets.

        Returns:
            Tokens and loss mask, `[N]` each.

        Raises:
            ChatTemplateError: The template refuses the dialogue, or renders an earlier turn
                differently when later turns follow; names the turn.
        """
        (encoded,) = self.encode_dialogues([messages])
        if isinstance(encoded, ChatTemplateError):
            raise encoded
        return encoded

    def encode_dialogues(
        self, dialogues: Sequence[Sequence[Message]], *, beyond_limits_at_most: int | None = None
    ) -> list[EncodedDialogue | ChatTemplateError]:
        """Encodes many dialogues at once, which is several times faster.

        Args:
            dialogues: Messages of each dialogue.
            beyond_limits_at_most: Dialogues on which the template may exceed its limits, each of
                which takes about a second; one more is the last. None: any number.

        Returns:
            For each dialogue, what `encode_dialogue` returns or raises.
        """
        rendered: list[RenderedDialogue | ChatTemplateError] = []
        beyond = 0
        for messages in dialogues:
            try:
                rendered.append(self._template.render_dialogue(messages))
            except ChatTemplateError as error:
                rendered.append(error)
                beyond += isinstance(error, TemplateLimitError)
                if beyond_limits_at_most is not None and beyond > beyond_limits_at_most:
                    break
        good = [one for one in rendered if isinstance(one, RenderedDialogue)]
        encoded = iter(self._encoder.encode([_split(one) for one in good]))
        return [
            _assemble(one, next(encoded)) if isinstance(one, RenderedDialogue) else one
            for one in rendered
        ]

    def encode_prompt(
        self, messages: Sequence[Message], *, begins: str = ""
    ) -> Int32[np.ndarray, "N"]:
        """Encodes a dialogue for the assistant to continue.

        Args:
            messages: Turns in order, the last one not the assistant's.
            begins: The given beginning of the assistant's turn, for example "Answer:".

        Returns:
            Tokens that end where the assistant's turn begins, `[N]`: a prefix of the tokens of
            every dialogue that `encode_dialogue` accepts and that continues this one. The tokens of
            `begins` follow them.

        Raises:
            ChatTemplateError: The template refuses the dialogue, or its last turn is the
                assistant's.
        """
        _check_prompt(messages)
        prompt = self._template.render_prompt(messages, begins=begins)
        (pieces,) = self._encoder.encode([_split(prompt)])
        return np.asarray([token for piece in pieces for token in piece.ids], np.int32)

    def prompt_text(self, messages: Sequence[Message], *, begins: str = "") -> str:
        """Renders a dialogue as text for the assistant to continue, with special tokens as text.

        Args:
            messages: As in `encode_prompt`.
            begins: As in `encode_prompt`.

        Returns:
            The text that `encode_prompt` encodes.

        Raises:
            ChatTemplateError: As `encode_prompt`.
        """
        _check_prompt(messages)
        text, _ = self._template.render(messages, prompt=True)
        return text + following(text, begins)

    def has_special_text(self, messages: Sequence[Message]) -> bool:
        """Whether a message contains a special token's text, which is read as that token."""
        return any(self._encoder.holds_special(message.content) for message in messages)

    def _find_stop_ids(self, eos_id: int | None) -> tuple[int, ...]:
        """The tokens that end an assistant's turn, in order, then the end of sequence."""
        stops = [] if eos_id is None else [eos_id]
        try:
            tokens, loss_mask = self.encode_dialogue(PROBE)
        except ChatTemplateError:
            return tuple(stops)
        ends: list[int] = []
        for token in reversed(tokens[loss_mask].tolist()):
            # The last special token, and those directly before it: "<|eot_id|></s>".
            known = self._encoder.silent if ends else self._encoder.special_tokens
            if token in known:
                ends.insert(0, token)
            elif token not in self._encoder.blank:
                break
        if not ends:
            _LOGGER.warning(
                "chat template %s has no token that ends the assistant's turn: a model trained "
                "with it will not stop by itself",
                self.name,
            )
        return tuple(dict.fromkeys([*ends, *stops]))


def make_chat_format(tokenizer: Any, *, template: str = "auto") -> ChatFormat:
    """Makes the chat format of a tokenizer.

    Args:
        tokenizer: A transformers tokenizer with a fast backend.
        template: `auto`, the tokenizer's own template if it has one, else `plain`; `tokenizer`, its
            own; `plain`, `llama-2`, `llama-3`, `chatml` or `vicuna`; or Jinja text. A template that
            renders today's date is pinned to 26 July 2024, with a warning.

    Returns:
        The format.

    Raises:
        ValueError: The name is unknown, or the tokenizer has no template of its own.
    """
    if template == "auto":
        template = "tokenizer" if tokenizer.chat_template else "plain"
        _announce(f"chat template: {template} ({tokenizer.name_or_path or 'made in memory'})")
    if template in NAMED_TEMPLATES:
        variables = named_template_variables(tokenizer, template)
        text = NAMED_TEMPLATES[template].text
        return ChatFormat(
            tokenizer, name=template, template=template, text=text, variables=variables
        )
    if template == "tokenizer":
        if not tokenizer.chat_template:
            raise ValueError(
                "chat template 'tokenizer': the tokenizer has no template of its own; use one of "
                f"{', '.join(NAMED_TEMPLATES)}"
            )
        name, text = "of the tokenizer", tokenizer.get_chat_template()
    elif "{%" in template or "{{" in template:
        name, text = "given as Jinja text", template
    else:
        raise ValueError(
            f"chat template: expected auto, tokenizer, {', '.join(NAMED_TEMPLATES)} or Jinja text, "
            f"got {template!r}"
        )
    variables = dict(tokenizer.special_tokens_map)
    chat = ChatFormat(tokenizer, name=name, template=text, text=text, variables=variables)
    if "strftime_now" in text:
        turn = _dated_turn(text, variables)
        _LOGGER.warning(
            "chat template %s renders today's date in turn %d: pinned to %s, so that training and "
            "decoding read the same text every day",
            name,
            turn,
            PINNED_DATE.date(),
        )
    return chat


@functools.cache
def _announce(message: str) -> None:
    """Log a message once: training and evaluation make many formats of the same tokenizer."""
    _LOGGER.info(message)


def _check_prompt(messages: Sequence[Message]) -> None:
    if not messages or messages[-1].role == "assistant":
        raise ChatTemplateError("a prompt must not end with an assistant's turn")


def _dated_turn(text: str, variables: Mapping[str, Any]) -> int:
    """The first turn whose rendering changes with the date."""
    today, tomorrow = (pin_date(text, PINNED_DATE + timedelta(days=days)) for days in (0, 1))
    for count in range(1, len(PROBE) + 1):
        messages = PROBE[:count]
        if render(today, variables, messages, prompt=True) != render(
            tomorrow, variables, messages, prompt=True
        ):
            return count - 1
    return 0


def _split(dialogue: RenderedDialogue) -> list[str]:
    """Split a text where the assistant's turns begin."""
    bounds = [0, *dialogue.cuts, len(dialogue.text)]
    return [dialogue.text[low:high] for low, high in itertools.pairwise(bounds)]


def _assemble(dialogue: RenderedDialogue, pieces: list[PieceTokens]) -> EncodedDialogue:
    """Joins the pieces' tokens; a token is a target if its first character is in one."""
    starts = [0, *dialogue.cuts]
    ends = [*dialogue.cuts, len(dialogue.text)]
    tokens: list[int] = []
    loss_mask: list[bool] = []
    for start, end, piece in zip(starts, ends, pieces, strict=True):
        inside = [span for span in dialogue.targets if span[0] < end and span[1] > start]
        tokens += piece.ids
        if inside == [(start, end)]:
            loss_mask += [True] * len(piece.ids)
        elif not inside:
            loss_mask += [False] * len(piece.ids)
        else:
            loss_mask += [
                any(low <= start + first < high for low, high in inside)
                for first, _ in piece.offsets()
            ]
    return EncodedDialogue(np.asarray(tokens, np.int32), np.asarray(loss_mask, bool))
