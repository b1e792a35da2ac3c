"""Renders a dialogue with a chat template, and finds the parts written by the assistant.

In: messages and a template. Out: the text; where each assistant's turn begins, which is where the
prompt that a decoder reads ends; and the parts that the assistant must produce.
"""

import contextlib
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ivl_jax.data.formats import Message
from ivl_jax.data.pieces import PieceEncoder
from ivl_jax.data.rendering import ChatTemplateError, TemplateLimitError, render

_LOGGER = logging.getLogger(__name__)

_SHOWN_CHARACTERS = 30  # on each side of the place where two renderings differ
_ANSWER = "Hi."
PROBE = (Message("user", "Hello!"), Message("assistant", _ANSWER))
_WITH_SYSTEM = (Message("system", "Be brief."), *PROBE)
_THINKING = "<think>\nHello!\n</think>\n\n"
_TAG = re.compile(r"<[^<>\s]+>")  # "<think>", "<channel|>"
_REMEDY = (
    'use a named template, dialogues with one assistant turn, or "weight": 0 on the earlier '
    "assistant turns"
)


class RenderedDialogue(NamedTuple):
    """The text of a dialogue, and the assistant's parts in it."""

    text: str
    cuts: list[int]  # where an assistant's turn begins, and so where a decoder's prompt ends
    targets: list[tuple[int, int]]  # parts that the assistant must produce, in characters


class DialogueTemplate:
    """A chat template with the special tokens of a tokenizer.

    Attributes:
        name: The template's name in messages.
        deviations: How its renderings differ from those of the first version of this package.
    """

    def __init__(
        self, name: str, text: str, variables: Mapping[str, Any], *, encoder: PieceEncoder, eos: str
    ):
        self.name = name
        self._text = text
        self._variables = variables
        self._encoder = encoder
        self._has_marks = re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", text) is not None
        self._warned = False
        self._check_usable()
        self._closing = self._find_closing(eos)
        self.deviations = self._find_deviations()

    def render(
        self, messages: Sequence[Message], *, prompt: bool, marks: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text of a dialogue, and the parts that the template marks as generated.

        Raises:
            ChatTemplateError: The template refuses the dialogue or fails on it.
        """
        try:
            return render(self._text, self._variables, messages, prompt=prompt, marks=marks)
        except ChatTemplateError as error:
            raise type(error)(f"chat template {self.name}: {error}") from error

    def render_dialogue(self, messages: Sequence[Message]) -> RenderedDialogue:
        """Renders a dialogue, and every beginning of it that a decoder would read or write.

        Raises:
            ChatTemplateError: The template refuses the dialogue, or renders a turn differently when
                later turns follow; names the turn.
        """
        text, marked = self.render(messages, prompt=False, marks=self._has_marks)
        cuts, targets = [], []
        for turn, message in enumerate(messages):
            if message.role != "assistant":
                continue
            prompt, _ = self.render(messages[:turn], prompt=True)
            if not message.weight:
                # As in a prompt: a template that drops earlier thinking only loses the cut.
                cuts += [len(prompt)] if text.startswith(prompt) else []
                continue
            last = turn + 1 == len(messages)
            through = (
                text.removesuffix(self._closing) if last else self._beginning(messages[: turn + 1])
            )
            if not text.startswith(through):
                raise self._changed(messages[: turn + 1], through, text)
            if not through.startswith(prompt):
                before = self._beginning(messages[:turn])
                if not through.startswith(before):
                    raise self._changed(messages[:turn], before, through)
            problem = self._problem(turn, message, prompt, through)
            if problem and not last:
                raise ChatTemplateError(f"{problem}; {_REMEDY}")
            if problem:
                text = self._written_out(messages, prompt, text, problem)
                through, marked = text.removesuffix(self._closing), []
            start, end = len(prompt), len(through)
            cuts.append(start)
            if self._has_marks and not problem:
                targets += [
                    (max(low, start), self._through_end_of_turn(text, high, end))
                    for low, high in marked
                    if low < end and high > start
                ]
            else:
                targets.append((start, self._end_of_turn(through, start)))
        return RenderedDialogue(text, sorted(set(cuts)), targets)

    def render_prompt(self, messages: Sequence[Message], *, begins: str) -> RenderedDialogue:
        """Renders a dialogue for the assistant to continue, cut as by `render_dialogue`.

        Raises:
            ChatTemplateError: The template refuses the dialogue.
        """
        text = self.render(messages, prompt=True)[0]
        cuts = []
        for turn, message in enumerate(messages):
            if message.role == "assistant":
                earlier, _ = self.render(messages[:turn], prompt=True)
                # A template that drops earlier thinking is accepted here: it only loses the cut.
                cuts += [len(earlier)] if text.startswith(earlier) else []
        if begins:
            cuts.append(len(text))
            text += following(text, begins)
        return RenderedDialogue(text, sorted(set(cuts)), [])

    def _beginning(self, messages: Sequence[Message]) -> str:
        """The text of an unfinished dialogue: without what closes a finished one."""
        return self.render(messages, prompt=False)[0].removesuffix(self._closing)

    def _end_of_turn(self, through: str, start: int) -> int:
        """Where an unmarked target ends: after the token that ends the turn."""
        written = through.rstrip()  # "\n" in ChatML
        ended = self._encoder.ends_with_special(written) and len(written) > start
        return len(written) if ended else len(through)

    def _through_end_of_turn(self, text: str, marked_end: int, turn_end: int) -> int:
        """Where a marked target ends: after an end-of-turn token that is not marked itself."""
        if marked_end >= turn_end:
            return marked_end
        after = text[marked_end:turn_end]
        blank = len(after) - len(after.lstrip())
        if blank and self._encoder.ends_with_special(text[:marked_end].rstrip()):
            return marked_end
        special = self._encoder.special_at(text[:turn_end], marked_end + blank)
        return marked_end + blank + len(special) if special else marked_end

    def _problem(self, turn: int, message: Message, prompt: str, through: str) -> str:
        """How a turn differs from what a decoder would write after its prompt, or ""."""
        where = f"chat template {self.name}: turn {turn} (assistant)"
        if not through.startswith(prompt):
            return f"{where} does not begin as the prompt for it ends: {_parting(prompt, through)}"
        if not _holds(message.content, prompt, through[len(prompt) :]):
            shown = message.content[:_SHOWN_CHARACTERS]
            return f"{where} is rendered without part of the assistant's message: {shown!r}…"
        return ""

    def _written_out(
        self, messages: Sequence[Message], prompt: str, text: str, problem: str
    ) -> str:
        """A dialogue with its last turn as a decoder writes it: prompt, answer, end of turn."""
        answer = messages[-1].content
        rest = _after(text, prompt)
        if rest is None or not _holds(answer, prompt, rest):
            rest = self._continuation(messages, prompt, problem)
        if not self._warned:
            self._warned = True
            _LOGGER.warning(
                "%s; the last turn of a dialogue is written as the template's prompt for it, the "
                "answer as it is in the row, and the end of turn",
                problem,
            )
        return prompt + rest

    def _continuation(self, messages: Sequence[Message], prompt: str, problem: str) -> str:
        """The row's answer and the end of turn.

        If the prompt has already begun the answer, as with "<think>", the rest of the answer after
        that beginning.
        """
        begun = prompt[_same(prompt, self._beginning(messages[:-1])) :]
        answer = messages[-1].content
        tags = _TAG.findall(begun)
        opened = begun[begun.rindex(tags[-1]) :] if tags else ""
        if opened and answer.lstrip().startswith(opened.strip()):
            answer = answer.lstrip().removeprefix(opened.strip())
            answer = answer.removeprefix(opened[len(opened.rstrip()) :])
        if repeated := [tag for tag in tags if tag in answer]:
            raise ChatTemplateError(
                f"{problem}; its prompt already has {repeated[0]}, and so does the answer: use "
                "another template, or rows without it"
            )
        probe = (*messages[:-1], Message("assistant", _ANSWER))
        _, found, end = self.render(probe, prompt=False)[0].rpartition(_ANSWER)
        if not found:
            raise ChatTemplateError(f"{problem}; it cannot render a plain answer: use another")
        return answer + end

    def _changed(self, messages: Sequence[Message], earlier: str, later: str) -> ChatTemplateError:
        """The error that names the first turn that is rendered differently later."""
        turn = len(messages) - 1
        for count in range(turn, 0, -1):
            with contextlib.suppress(ChatTemplateError):  # a template may refuse a lone system turn
                if not later.startswith(self._beginning(messages[:count])):
                    turn = count - 1
        return ChatTemplateError(
            f"chat template {self.name}: turn {turn} is rendered differently when later turns "
            f"follow: {_parting(earlier, later)}; a model decodes after the first and would learn "
            f"the second: {_REMEDY}"
        )

    def _check_usable(self) -> None:
        """Raise an error if the template renders nothing at all, before any row is read."""
        first: ChatTemplateError | None = None
        for messages in (PROBE, PROBE[:1], _WITH_SYSTEM, _WITH_SYSTEM[:2]):
            try:
                self.render(messages, prompt=messages[-1].role == "user")
                return
            except TemplateLimitError:
                raise
            except ChatTemplateError as error:
                first = first or error
        assert first is not None
        raise first

    def _find_closing(self, eos: str) -> str:
        """The end of sequence if a template adds one after a whole dialogue, like Phi 3.5's.

        No assistant's turn ends with it, and it does not follow a turn in an unfinished dialogue.
        """
        with contextlib.suppress(ChatTemplateError):
            whole, _ = self.render(PROBE, prompt=False)
            going_on, _ = self.render(PROBE, prompt=True)
            closed = eos and whole.endswith(eos) and not going_on.startswith(whole)
            if closed and going_on.startswith(whole.removesuffix(eos)):
                return eos
        return ""

    def _find_deviations(self) -> tuple[str, ...]:
        """How this version differs: whole answers, and ends of turn that are learned."""
        found = []
        with contextlib.suppress(ChatTemplateError):
            text, marked = self.render(PROBE, prompt=False, marks=self._has_marks)
            ends = [self._through_end_of_turn(text, high, len(text)) for _, high in marked]
            blank = [text[high:end] for (_, high), end in zip(marked, ends, strict=True)]
            found += ["end of turn after blanks"] if any(b != b.lstrip() for b in blank) else []
        with contextlib.suppress(ChatTemplateError):
            content = _THINKING + _ANSWER
            text, _ = self.render((PROBE[0], Message("assistant", content)), prompt=False)
            found += [] if _dense(content) in _dense(text) else ["whole answers"]
        return tuple(found)


def following(text: str, begins: str) -> str:
    """A turn's beginning after a prompt: after a space, unless there is white space already."""
    return f" {begins}" if begins and not text.endswith((" ", "\n")) else begins


def _dense(text: str) -> str:
    """A text without white space, which templates trim and add."""
    return "".join(text.split())


def _holds(answer: str, prompt: str, rest: str) -> bool:
    """Whether a turn has all of an answer, whose beginning may be in the prompt."""
    wanted = _dense(answer)
    if wanted in _dense(rest):
        return True
    begun = _dense(prompt[-len(answer) - _SHOWN_CHARACTERS :])
    place = (begun + _dense(rest)).rfind(wanted)
    return place >= 0 and place + len(wanted) > len(begun)


def _after(text: str, prompt: str) -> str | None:
    """What follows a prompt in a text, up to white space; None if it is not there."""
    wanted, position = _dense(prompt), 0
    for character in wanted:
        while text[position : position + 1].isspace():
            position += 1
        if text[position : position + 1] != character:
            return None
        position += 1
    return text[position:].lstrip()


def _same(first: str, second: str) -> int:
    """The length of the common prefix of two texts."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
        min(len(first), len(second)),
    )


def _parting(first: str, second: str) -> str:
    """Two texts around the place where they first differ."""
    same = _same(first, second)
    low, high = max(0, same - _SHOWN_CHARACTERS), same + _SHOWN_CHARACTERS
    return f"…{first[low:high]!r} against …{second[low:high]!r}"
