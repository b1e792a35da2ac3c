"""The lm-evaluation-harness model `ivl`: a base with value networks, for all tasks of the harness.

In: the harness's requests. Out: log-likelihoods and generated texts, batched by length in bucketed
shapes. Tokenisation, windows and stop strings are the harness's own, so that figures are comparable
with those of its Hugging Face model. Importing this module registers the name.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from tqdm import tqdm

from ivl_jax.data.chat import ChatFormat
from ivl_jax.data.formats import Message
from ivl_jax.decoding.model import ComposedModel
from ivl_jax.decoding.prompts import PromptReader
from ivl_jax.decoding.requests import GenerationOptions
from ivl_jax.evaluation.harness_arguments import DEFAULT_BATCH_SIZE, read_arguments
from ivl_jax.evaluation.loading import ModelSources, chat_format_of, find_sources, load_model
from ivl_jax.evaluation.scoring import Row, RowScores, score_rows

logger = logging.getLogger(__name__)

_DEFAULT_NEW_TOKENS = 256  # like the harness's other models
# Accepted generation arguments, with the only values that do not change the text.
_WITHOUT_EFFECT: Mapping[str, Any] = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "use_cache": True,
}

_EncodedPair = tuple[Any, list[int], list[int]]  # request's strings or None, context, continuation


class ModelArgumentsError(ValueError):
    """`--model_args` that do not name a usable model."""


@register_model("ivl")
class IvlLM(TemplateLM):
    """A composed model behind the harness's interface.

    `--model ivl --model_args base=BASE,value=VALUE,strength=1.0` makes one on the command line.

    Args:
        model: the model to evaluate.
        batch_size: requests computed together.
        max_length: the most tokens per request; longer ones are truncated on the left. None: the
            context.
        seed: of sampled generations; the request's index is folded in.
        chat_format: writes dialogues (`--apply_chat_template`); None: the model's own.
        sources: where the model came from, for the results file.

    Raises:
        ValueError: `max_length` exceeds the model's context.
    """

    def __init__(
        self,
        model: ComposedModel,
        *,
        batch_size: int = DEFAULT_BATCH_SIZE,
        max_length: int | None = None,
        seed: int = 0,
        chat_format: ChatFormat | None = None,
        sources: ModelSources | None = None,
    ) -> None:
        super().__init__()
        _check_max_length(max_length, model.prompts)
        self.model = model
        self.batch_size = batch_size
        self.max_length = max_length or model.context
        self.tokenizer = model.tokenizer
        self._seed = seed
        self._chat = model.chat_format if chat_format is None else chat_format
        self._chatting = False
        self._sources = sources

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> "IvlLM":
        """Make the model that `--model_args` describes.

        Args:
            arg_dict: the arguments.
            additional_config: `batch_size` of the command line; `device` and `max_batch_size` are
                ignored.

        Raises:
            ModelArgumentsError: an unknown argument, or models that are missing or do not fit;
                raised before any weight is read.
        """
        given = {"batch_size": (additional_config or {}).get("batch_size"), **arg_dict}
        try:
            flags, options = read_arguments({k: v for k, v in given.items() if v is not None})
            sources = find_sources(flags)
            chat_format = chat_format_of(sources)
            _check_max_length(options.get("max_length"), sources.prompts)
        except (OSError, ValueError) as error:
            raise ModelArgumentsError(str(error)) from error
        return cls(load_model(sources), **options, chat_format=chat_format, sources=sources)

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: Mapping[str, Any] | None = None
    ) -> "IvlLM":
        """Make the model from `base=…,value=…`; see `create_from_arg_obj`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def eot_token_id(self) -> int:
        """The base's end-of-sequence token."""
        return cast(int, self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context."""
        bos_id = self.model.base.tokenizer_info.bos_id
        return self.eot_token_id if bos_id is None else bos_id

    @property
    def max_gen_toks(self) -> int:
        """Tokens generated if a task does not say how many."""
        return _DEFAULT_NEW_TOKENS

    @property
    def tokenizer_name(self) -> str:
        """Identifies tokenizer and chat template in the harness's cache of requests."""
        return f"{self.model.base.path.replace('/', '__')}-{self._chat.fingerprint[:12]}"

    def get_model_info(self) -> dict[str, Any]:
        """The record of the model in the results file."""
        return {} if self._sources is None else self._sources.to_json()

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **unused: Any
    ) -> list[int]:
        """Encode a text in the base's tokens.

        Args:
            string: the text.
            add_special_tokens: whether to add the tokenizer's special tokens; None: yes, unless the
                text already begins with the beginning-of-sequence token.
            unused: arguments for other models of the harness.
        """
        if add_special_tokens is None:
            begun = has_bos_prefix(string, self.tokenizer.decode([self.prefix_token_id]))
            add_special_tokens = not begun
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens, verbose=False)

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render a dialogue in the chat template that the value network was trained with.

        Args:
            chat_history: messages with `role` and `content`.
            add_generation_prompt: whether the assistant's turn starts empty; otherwise the last
                message is its beginning.
        """
        self._chatting = True  # from now on an end of turn ends a generation
        messages = [Message(message["role"], message["content"]) for message in chat_history]
        if add_generation_prompt:
            return self._chat.prompt_text(messages)
        return self._chat.prompt_text(messages[:-1], begins=messages[-1].content)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The chat template, for the results file."""
        return self._chat.template if chat_template else None

    def _loglikelihood_tokens(
        self, requests: Sequence[_EncodedPair], disable_tqdm: bool = False, **unused: Any
    ) -> list[tuple[float, bool]]:
        """Score continuations; requests that differ only in their last token share a row."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            if not 1 <= len(continuation) <= self.max_length:
                raise ValueError(
                    f"request {index}: a continuation of {len(continuation)} tokens; expected 1 to "
                    f"{self.max_length}, the most that a request may have"
                )
            read = tuple([*context, *continuation][-(self.max_length + 1) : -1])
            groups.setdefault(read, []).append(index)
        self._warn_truncated(len(c) + len(t) > self.max_length + 1 for _, c, t in requests)
        members, rows = list(groups.values()), []
        for read, group in groups.items():
            last = list(dict.fromkeys(requests[index][2][-1] for index in group))
            rows.append(Row((*read, last[0]), last[1:]))
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        bar = tqdm(total=len(requests), desc="loglikelihood", disable=disable_tqdm)
        for place, scores in score_rows(self.model, rows, batch_size=self.batch_size):
            candidates = [rows[place].token_ids[-1], *rows[place].other_last]
            for index in members[place]:
                strings, _, continuation = requests[index]
                choice = candidates.index(continuation[-1])
                answers[index] = _answer(scores, len(continuation), choice)
                if strings is not None:  # windows of a rolling request have none
                    self.cache_hook.add_partial("loglikelihood", strings, answers[index])
            bar.update(len(members[place]))
        bar.close()
        return answers

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts, in windows of `max_length` tokens."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for pair in pairs:
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        answers = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for owner, (log_likelihood, _) in zip(owners, answers, strict=True):
            totals[owner] += log_likelihood
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate from contexts, each with its own generation arguments, until a stop string."""
        contexts, options, stops, truncated = [], [], [], []
        for request in requests:
            context, arguments = cast(tuple[str, dict[str, Any]], request.args)
            option, until = self._options(arguments)
            room = self.max_length - option.max_new_tokens
            if room < 1:
                raise ValueError(
                    f"max_gen_toks = {option.max_new_tokens} leaves no room for a prompt in "
                    f"{self.max_length} tokens (the context of {self.model.context_of}, or "
                    "max_length): pass --gen_kwargs max_gen_toks=N with a smaller N"
                )
            encoded = self.tok_encode(context) or [self.prefix_token_id]
            truncated.append(len(encoded) > room)
            contexts.append(encoded[-room:])
            options.append(option)
            stops.append(until)
        self._warn_truncated(truncated)
        prompts = self.model.prepare(contexts, options)
        # A prompt keeps its index, and so its samples, despite the sorting.
        order = sorted(range(len(prompts)), key=lambda index: -len(contexts[index]))
        texts = [""] * len(requests)
        bar = tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm)
        generations = self.model.generate_prepared(
            [prompts[index] for index in order], batch_size=self.batch_size
        )
        for index, generation in zip(order, generations, strict=True):
            generation.text_of(f"request {index}")  # an error must not pass for an empty text
            # The harness's models decode a continuation by itself: without the space at its
            # beginning, if the tokenizer drops it.
            text = str(self.tokenizer.decode([*generation.token_ids], skip_special_tokens=True))
            texts[index] = postprocess_generated_text(text, stops[index], None)
            self.cache_hook.add_partial("generate_until", requests[index].args, texts[index])
            bar.update(1)
        bar.close()
        return texts

    def _options(self, arguments: Mapping[str, Any]) -> tuple[GenerationOptions, list[str]]:
        """A request's generation options and its stop strings."""
        given: dict[str, Any] = dict(normalize_gen_kwargs(dict(arguments), self.max_gen_toks))
        until = [string for string in given.pop("until") if string]
        sampled, limit = given.pop("do_sample"), given.pop("max_gen_toks")
        temperature = float(given.pop("temperature", 1.0))
        filters = {name: given.pop(name) for name in ("top_k", "top_p", "min_p") if name in given}
        for name, value in given.items():
            if name not in _WITHOUT_EFFECT or _WITHOUT_EFFECT[name] != value:
                raise ValueError(
                    f"generation argument {name} = {value!r} is not supported by ivl, only "
                    "do_sample, temperature, top_k, top_p, min_p, max_gen_toks and until"
                )
        special = {text: i for i, text in self.model.base.tokenizer_info.special_tokens.items()}
        stop_ids = [special[string] for string in until if string in special]
        option = GenerationOptions(
            max_new_tokens=limit,
            temperature=temperature if sampled else 0.0,
            seed=self._seed,
            stop=tuple(string for string in until if string not in special),
            stop_ids=(*stop_ids, *(self._chat.stop_ids if self._chatting else ())),
            **(filters if sampled else {}),
        )
        return option, until

    def _warn_truncated(self, truncated: Iterable[bool]) -> None:
        if count := sum(truncated):
            logger.warning(
                "%d requests are longer than %d tokens: their beginning was cut off",
                count,
                self.max_length,
            )


def _answer(scores: RowScores, length: int, choice: int) -> tuple[float, bool]:
    """Log-likelihood of a row's last `length` tokens, with the chosen candidate as the last one.

    Also returns whether all of them are the arg-max.
    """
    before = slice(len(scores.tokens.log_prob) - length, -1)
    log_likelihood = scores.tokens.log_prob[before].sum() + scores.choices.log_prob[choice]
    greedy = scores.tokens.largest[before].all() and scores.choices.largest[choice]
    return float(log_likelihood), bool(greedy)


def _check_max_length(max_length: int | None, prompts: PromptReader) -> None:
    if max_length is not None and not 1 <= max_length <= prompts.context:
        raise ValueError(
            f"max_length = {max_length}: expected 1 to {prompts.context} tokens, the context of "
            f"{prompts.context_of}"
        )
