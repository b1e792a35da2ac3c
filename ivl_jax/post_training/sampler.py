"""Answers prompts with the networks of a run, as they are at a step.

In: trained parameters, a base, demonstrations. Out: `Answers`. The engine reads the arrays of the
training step: where both store them in the same form, on a mesh and on any accelerator, nothing is
copied but stacked layers of the trained network and a tied head, which decoding transposes; an
adapter is merged into a copy of its model. One CPU device decodes in a form of its own, so it holds
the base twice.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ivl_jax.checkpoint import ValueNetwork
from ivl_jax.composed.kernel_form import lay_out_network
from ivl_jax.composed.network import ComposedParams
from ivl_jax.config import GenerationOptions, TrainConfig
from ivl_jax.data.batching import Batch
from ivl_jax.data.formats import Demonstration
from ivl_jax.decoding.compose import compose
from ivl_jax.decoding.engine import Progress
from ivl_jax.decoding.model import ComposedModel
from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.decoder import Params, unstack_layers
from ivl_jax.model.lora import join, merge
from ivl_jax.model.projection import Lora
from ivl_jax.post_training.answers import Answers, lay_out_answers, sample_of
from ivl_jax.sharding import LAYOUTS
from ivl_jax.training.objectives.objective import Sampling
from ivl_jax.training.output import stop_ids, value_metadata
from ivl_jax.training.programs import BaseProgram
from ivl_jax.training.record_file import RecordFile
from ivl_jax.training.rollouts import SamplingProgress, Watch
from ivl_jax.training.setup import Preparation
from ivl_jax.training.used_weights import UsedWeights
from ivl_jax.weights.language_model import LanguageModel

_SEEDS = 2**32


class Sampler:
    """Samples answers for the steps of a run."""

    def __init__(
        self,
        config: TrainConfig,
        prepared: Preparation,
        weights: UsedWeights,
        sampling: Sampling,
        *,
        samples_file: RecordFile,
    ) -> None:
        """Store what sampling needs besides parameters and prompts.

        Args:
            config: of the run.
            prepared: its models and mesh.
            weights: fingerprints of the weights it reads.
            sampling: how answers are sampled.
            samples_file: where some of them are written.
        """
        self.sampling = sampling
        self._config = config
        self._prepared = prepared
        self._weights = weights
        self._samples_file = samples_file
        self._composed: dict[str, ComposedModel] = {}
        self._writing = False

    def sample(
        self,
        params: Params,
        step: int,
        demonstrations: Sequence[Demonstration],
        program: BaseProgram,
        *,
        watch: Watch,
    ) -> Answers:
        """Answer the prompts of a step; the same step and parameters give the same answers.

        Args:
            params: of the trained model.
            step: steps taken.
            demonstrations: whose prompts are answered, each as often as a group has answers.
            program: of the base.
            watch: is told how far sampling has come.

        Returns:
            The answers, those to the same prompt together.
        """
        # They depend on nothing but the run's seed, the step and the parameters.
        seed = int(np.random.SeedSequence([self._config.seed, step]).generate_state(1)[0]) % _SEEDS
        asked = [one for one in demonstrations for _ in range(self.sampling.group_size)]
        temperature = self.sampling.temperature
        return self.answer(params, asked, program, temperature=temperature, seed=seed, watch=watch)

    def answer(
        self,
        params: Params,
        demonstrations: Sequence[Demonstration],
        program: BaseProgram,
        *,
        temperature: float,
        seed: int,
        watch: Watch,
    ) -> Answers:
        """Answer prompts.

        Args:
            params: of the trained model.
            demonstrations: whose prompts are answered.
            program: of the base.
            temperature: of sampling; 0 is greedy.
            seed: of sampling.
            watch: is told how far sampling has come.

        Returns:
            One answer each, in order.
        """
        model = self._model(params, program)
        options = GenerationOptions(
            max_new_tokens=self.sampling.max_new_tokens, temperature=temperature, seed=seed
        )
        names = [one.row_id for one in demonstrations]
        prompts = [one.messages[:-1] for one in demonstrations]
        prepared = model.prepare(prompts, options, names=names)
        tokens = [one.token_ids for one in prepared]
        rows, done = self._config.step.batch_size, SamplingProgress(0, len(prepared), 0)

        def after_step(found: Sequence[Progress]) -> None:
            nonlocal done
            ended = sum(one.generation is not None for one in found)
            sampled = sum(len(one.token_ids) for one in found)
            done = done._replace(answers=done.answers + ended, tokens=done.tokens + sampled)
            watch(done)

        generations = list(
            model.generate_prepared(prepared, batch_size=rows, after_step=after_step)
        )
        samples = [
            sample_of(one, generation.text_of(one.row_id))
            for generation, one in zip(generations, demonstrations, strict=True)
        ]
        return Answers(tokens, generations, samples)

    def batch(self, answers: Answers) -> Batch:
        """The batch of a step: its answers, and empty rows after the last prompts of an epoch.

        Args:
            answers: from `sample`.

        Returns:
            NumPy arrays [B T].
        """
        return lay_out_answers(
            answers,
            rows=self._config.step.batch_size,
            length=self._config.data.max_length,
            pad_id=self._prepared.models.trained.info.pad_id,
            mask_truncated=self.sampling.mask_truncated,
        )

    def write(
        self, step: int, answers: Answers, columns: Mapping[str, Sequence[float] | np.ndarray]
    ) -> None:
        """Add answers to the run's `samples.jsonl`, once every `logging.log_every` steps.

        Args:
            step: steps taken before.
            answers: from `sample`.
            columns: further numbers of each answer, by name.
        """
        every, last = self._config.logging.log_every, step + self.sampling.updates
        if last // every == step // every:
            return
        if not self._writing:
            # A run that was stopped had perhaps come further than what is resumed.
            self._samples_file.cut_from(last)
            self._writing = True
        for index, sample in enumerate(answers.samples):
            record: dict[str, Any] = {
                "step": last,
                "row": sample.name,
                "prompt": sample.prompt,
                "answer": sample.answer,
            }
            self._samples_file.append(
                record | {name: float(each[index]) for name, each in columns.items()}
            )

    def _model(self, params: Params, program: BaseProgram) -> ComposedModel:
        """The composed model with these parameters; programs are compiled once for each base."""
        if self._prepared.models.lora is not None and self._prepared.frozen is not None:
            params = _merged(params, self._prepared.frozen, self._prepared.models.lora)
        if self._config.step.scan_layers:
            params = unstack_layers(params)
        composed = self._composed.get(program.name)
        if composed is None:
            if program.base is None:
                composed = self._alone(params)
            else:
                composed = self._beside_base(params, program)
            self._composed[program.name] = _without_trained(composed)
            return composed
        network = (*composed.composition.values, composed.composition.base)[0]
        _, arranged = lay_out_network(params, network.arch, network.layout)
        replaced = ComposedParams(arranged)
        if composed.params.values:
            (arrays,) = composed.params.values
            replaced = ComposedParams(composed.params.base, (arrays._replace(params=arranged),))
        return dataclasses.replace(composed, params=replaced)

    def _alone(self, params: Params) -> ComposedModel:
        """A model without value networks, which reads dialogues in the run's chat format."""
        trained, arch = self._prepared.models.trained, self._prepared.models.arch
        assert isinstance(arch, ArchConfig)
        model = compose(
            LanguageModel(
                path=trained.path,
                arch=arch,
                params=params,
                tokenizer=trained.tokenizer,
                tokenizer_info=trained.info,
                stop_ids=stop_ids(self._prepared),
            ),
            mesh=self._mesh,
            base_rules=LAYOUTS[self._config.trained_layout],
            compute_dtype=self._compute_dtype,
        )
        template = self._prepared.data.chat_format.template
        source = dataclasses.replace(model.prompts.base, chat_template=template)
        return dataclasses.replace(model, prompts=dataclasses.replace(model.prompts, base=source))

    def _beside_base(self, params: Params, program: BaseProgram) -> ComposedModel:
        """A base with the value network."""
        assert program.base is not None
        assert program.base_params is not None
        base, models = program.base.model, self._prepared.models
        described = value_metadata(self._config, self._prepared, self._weights, steps=0)
        metadata = dataclasses.replace(described, adapter=None)
        connection = self._config.value.connection
        return compose(
            LanguageModel(
                path=base.path,
                arch=base.decoder,
                params=program.base_params,
                tokenizer=base.tokenizer,
                tokenizer_info=base.info,
                stop_ids=base.stop_ids,
            ),
            ValueNetwork(
                arch=models.arch,
                params=params,
                connection=connection,
                metadata=metadata,
                tokenizer=models.trained.tokenizer,
                tokenizer_info=models.trained.info,
                chat_template=metadata.chat_template,
                stop_ids=metadata.stop_ids,
            ),
            schemes={connection: models.scheme} if models.scheme is not None else {},
            mesh=self._mesh,
            base_rules=LAYOUTS[program.base.config.layout],
            value_rules=LAYOUTS[self._config.trained_layout],
            compute_dtype=self._compute_dtype,
        )

    @property
    def _compute_dtype(self) -> jnp.dtype:
        """The step's: what is sampled from is the distribution that the step scores."""
        return jnp.dtype(self._config.step.compute_dtype)

    @property
    def _mesh(self) -> Mesh | None:
        """Where to decode; None: one CPU device, which is fastest with arrays of its own form."""
        mesh = self._prepared.mesh
        alone_on_cpu = mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"
        return None if alone_on_cpu else mesh


def _without_trained(model: ComposedModel) -> ComposedModel:
    """The model without the trained network's arrays, which the next step makes anew."""
    if not model.values:
        base = dataclasses.replace(model.base, params={})
        return dataclasses.replace(model, base=base, params=ComposedParams({}))
    (arrays,) = model.params.values
    return dataclasses.replace(
        model,
        params=ComposedParams(model.params.base, (arrays._replace(params={}),)),
        values=tuple(dataclasses.replace(value, params={}) for value in model.values),
    )


@functools.partial(jax.jit, static_argnames="lora")
def _merged(adapter: Params, frozen: Params, lora: Lora) -> Params:
    return merge(join(adapter, frozen), lora, dtype=jnp.float32)
