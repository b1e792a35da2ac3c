"""Training on answers that the model samples itself: rollouts by the engine, updates by the step.

    ivl_jax.post_training.run("configs/demo_grpo.toml")

In: a config. Out: what `ivl_jax.training.loop.run` returns. Objectives that need no samples run as
they do there. Training and decoding do not know each other; this module gives the one to the other.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ivl_jax.checkpoint import ValueNetwork
from ivl_jax.composed.kernel_form import lay_out_network
from ivl_jax.composed.network import ComposedParams
from ivl_jax.config import ConfigError, GenerationOptions, TrainConfig, train_config_of
from ivl_jax.data.batching import Batch, lay_out_rows
from ivl_jax.data.formats import Demonstration
from ivl_jax.decoding.compose import compose
from ivl_jax.decoding.generation import Generation
from ivl_jax.decoding.model import ComposedModel
from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.decoder import Params, unstack_layers
from ivl_jax.rewards import Sample, find_reward, weighted_reward
from ivl_jax.training import loop
from ivl_jax.training.loop import TrainResult
from ivl_jax.training.objectives.grpo import advantages
from ivl_jax.training.output import stop_ids, value_metadata
from ivl_jax.training.record_file import RecordFile
from ivl_jax.training.rollouts import Rollouts
from ivl_jax.training.run_directory import RunDirectory
from ivl_jax.training.setup import Preparation
from ivl_jax.training.used_weights import UsedWeights
from ivl_jax.weights.language_model import LanguageModel

_SEEDS = 2**32


def run(config: TrainConfig | str | os.PathLike[str] | Mapping[str, Any]) -> TrainResult:
    """Train according to a config, with rollouts where the objective needs them.

    Args:
        config: as `ivl_jax.training.loop.run` takes it.

    Returns:
        The result.

    Raises:
        ConfigError: the config cannot work; also for a reward that does not exist.
        RewardError: a reward function raised or returned something else than a finite number.
    """
    config = train_config_of(config)
    try:
        rewards = _find_rewards(config)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return loop.run(config, make_rollouts=functools.partial(_make_rollouts, rewards))


class _Answers(NamedTuple):
    """Answers to prompts, and what they are worth."""

    prompts: list[list[int]]
    generations: list[Generation]
    samples: list[Sample]
    rewards: np.ndarray  # [number of answers]
    by_name: dict[str, float]  # mean of each reward

    def figures(self) -> dict[str, float]:
        """Means over the answers."""
        length = np.mean([len(one.token_ids) for one in self.generations])
        truncated = np.mean([one.finish_reason == "length" for one in self.generations])
        several = {f"reward/{name}": value for name, value in self.by_name.items()}
        return {
            "reward": float(self.rewards.mean()),
            "answer_tokens": float(length),
            "truncated": float(truncated),
            **(several if len(several) > 1 else {}),
        }


class _EngineRollouts:
    """Rollouts by the decoding engine."""

    def __init__(
        self,
        config: TrainConfig,
        model: ComposedModel,
        rewards: Sequence[Any],
        *,
        pad_id: int,
        samples_file: RecordFile,
    ) -> None:
        self._config = config
        self._model = model
        self._rewards = rewards
        self._pad_id = pad_id
        self._samples_file = samples_file

    def batch(
        self, params: Params, step: int, demonstrations: Sequence[Demonstration]
    ) -> tuple[Batch, Mapping[str, float]]:
        """See `Rollouts`."""
        options, size = self._config.grpo, self._config.grpo.group_size
        # A step's samples depend on nothing but the run's seed, the step and the parameters.
        seed = int(np.random.SeedSequence([self._config.seed, step]).generate_state(1)[0]) % _SEEDS
        asked = [one for one in demonstrations for _ in range(size)]
        answers = self._answer(params, asked, temperature=options.temperature, seed=seed)
        grouped = answers.rewards.reshape(-1, size)
        gains = advantages(grouped, standardised=options.advantage == "standardised").ravel()
        every, last = self._config.logging.log_every, step + options.updates
        if last // every > step // every:
            self._write_samples(last, answers, gains)
        equal = np.mean(np.ptp(grouped, axis=1) == 0)
        return self._batch(answers, gains), {**answers.figures(), "equal_groups": float(equal)}

    def evaluate(
        self, params: Params, demonstrations: Sequence[Demonstration]
    ) -> Mapping[str, float]:
        """See `Rollouts`."""
        figures = self._answer(params, demonstrations, temperature=0.0, seed=0).figures()
        # The best checkpoint is the one whose figure is lowest.
        return {**figures, "missed_reward": -figures["reward"]}

    def _answer(
        self,
        params: Params,
        demonstrations: Sequence[Demonstration],
        *,
        temperature: float,
        seed: int,
    ) -> _Answers:
        model = _with_params(self._model, params, stacked=self._config.step.scan_layers)
        options = GenerationOptions(
            max_new_tokens=self._config.grpo.max_new_tokens, temperature=temperature, seed=seed
        )
        prompts = [one.messages[:-1] for one in demonstrations]
        names = [one.row_id for one in demonstrations]
        prepared = model.prepare(prompts, options, names=names)
        self._check_lengths(names, [len(one.token_ids) for one in prepared])
        rows = self._config.step.batch_size
        generations = list(model.generate_prepared(prepared, batch_size=rows))
        samples = [
            Sample(
                generation.text_of(one.row_id),
                one.messages[-1].content,
                one.messages[-2].content,
                one.row_id,
            )
            for generation, one in zip(generations, demonstrations, strict=True)
        ]
        found = [weighted_reward(self._rewards, sample) for sample in samples]
        by_name = {
            name: float(np.mean([each[name] for _, each in found])) for name, _, _ in self._rewards
        }
        totals = np.asarray([total for total, _ in found], np.float64)
        tokens = [one.token_ids for one in prepared]
        return _Answers(tokens, generations, samples, totals, by_name)

    def _check_lengths(self, names: Sequence[str], lengths: Sequence[int]) -> None:
        most, longest = self._config.data.max_length, self._config.grpo.max_new_tokens
        for name, length in zip(names, lengths, strict=True):
            if length + longest > most + 1:
                raise ConfigError(
                    f"{name}: its prompt of {length} tokens and an answer of grpo.max_new_tokens = "
                    f"{longest} do not fit into data.max_length = {most}: raise data.max_length, "
                    "lower grpo.max_new_tokens, or leave the row out"
                )

    def _batch(self, answers: _Answers, gains: np.ndarray) -> Batch:
        """One answer per row, filled up with empty rows after the last prompts of an epoch."""
        size, length = self._config.step.batch_size, self._config.data.max_length
        rows: list[Any] = []
        for prompt, generation in zip(answers.prompts, answers.generations, strict=True):
            ids = np.asarray([*prompt, *generation.token_ids], np.int32)
            counted = np.arange(len(ids)) >= len(prompt)
            if self._config.grpo.mask_truncated and generation.finish_reason == "length":
                counted = np.zeros_like(counted)
            rows.append([(ids, counted)])
        rows += [[] for _ in range(size - len(rows))]
        batch = lay_out_rows(rows, sequence_length=length, pad_id=self._pad_id)
        column = np.zeros((size, 1), np.float32)
        column[: len(gains), 0] = gains
        return batch._replace(advantages=np.repeat(column, length, axis=1))

    def _write_samples(self, step: int, answers: _Answers, gains: np.ndarray) -> None:
        """Add a step's answers to the run's `samples.jsonl`."""
        values = zip(answers.samples, answers.rewards, gains, strict=True)
        for sample, reward, gain in values:
            self._samples_file.append(
                {
                    "step": step,
                    "row": sample.name,
                    "prompt": sample.prompt,
                    "answer": sample.answer,
                    "reward": float(reward),
                    "advantage": float(gain),
                }
            )


def _make_rollouts(
    rewards: Sequence[Any],
    config: TrainConfig,
    prepared: Preparation,
    weights: UsedWeights,
    directory: RunDirectory,
) -> Rollouts:
    """Compose the model that is trained; every step replaces its parameters."""
    models = prepared.models
    alone = not models.bases
    return _EngineRollouts(
        config,
        _trained_alone(config, prepared) if alone else _beside_base(config, prepared, weights),
        rewards,
        pad_id=models.trained.info.pad_id,
        samples_file=directory.samples,
    )


def _trained_alone(config: TrainConfig, prepared: Preparation) -> ComposedModel:
    """The model without value networks, which reads dialogues in the run's chat format."""
    trained, arch = prepared.models.trained, prepared.models.arch
    assert isinstance(arch, ArchConfig)
    model = compose(
        LanguageModel(
            path=trained.path,
            arch=arch,
            params=_own_layers(prepared.make_state().params, stacked=config.step.scan_layers),
            tokenizer=trained.tokenizer,
            tokenizer_info=trained.info,
            stop_ids=stop_ids(prepared),
        ),
        mesh=prepared.mesh if prepared.mesh.size > 1 else None,
    )
    template = prepared.data.chat_format.template
    source = dataclasses.replace(model.prompts.base, chat_template=template)
    return dataclasses.replace(model, prompts=dataclasses.replace(model.prompts, base=source))


def _beside_base(config: TrainConfig, prepared: Preparation, weights: UsedWeights) -> ComposedModel:
    """The base with the value network."""
    models = prepared.models
    metadata = value_metadata(config, prepared, weights, steps=0)
    value = ValueNetwork(
        arch=models.arch,
        params=_own_layers(prepared.make_state().params, stacked=config.step.scan_layers),
        connection=config.value.connection,
        metadata=metadata,
        tokenizer=models.trained.tokenizer,
        tokenizer_info=models.trained.info,
        chat_template=metadata.chat_template,
        stop_ids=metadata.stop_ids,
    )
    schemes = {config.value.connection: models.scheme} if models.scheme is not None else {}
    base, mesh = config.base, prepared.mesh
    return compose(
        str(models.bases[0].model.local_folder),
        value,
        schemes=schemes,
        mesh=mesh if mesh.size > 1 else None,
        int8_base=base.param_dtype == "int8",
        param_dtype="float32" if base.param_dtype == "int8" else base.param_dtype,
    )


def _with_params(model: ComposedModel, params: Params, *, stacked: bool) -> ComposedModel:
    """The model with other parameters of its trained network; nothing is compiled again."""
    network = (*model.composition.values, model.composition.base)[0]
    _, arranged = lay_out_network(
        _own_layers(params, stacked=stacked), network.arch, network.layout
    )
    composed = ComposedParams(arranged)
    if model.params.values:
        (arrays,) = model.params.values
        composed = ComposedParams(model.params.base, (arrays._replace(params=arranged),))
    return dataclasses.replace(model, params=composed)


def _own_layers(params: Params, *, stacked: bool) -> Params:
    return unstack_layers(params) if stacked else params


def _find_rewards(config: TrainConfig) -> list[Any]:
    """Name, function and weight of each reward of a config."""
    options = config.grpo
    weights = options.reward_weights or (1.0,) * len(options.rewards)
    return [
        (name, find_reward(name, where="grpo.rewards"), weight)
        for name, weight in zip(options.rewards, weights, strict=True)
    ]
