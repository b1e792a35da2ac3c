"""TRL's DPO loss on the logits of a composed model, as a peer of ours.

stories260k is base and value network, and the base is the reference. TRL's own `DPOTrainer`
computes the loss from the same logits; its gradient with respect to them goes through the value
network's transposed Jacobian, so that gradients are compared per parameter. Where TRL is installed:

    PYTHONPATH=. python -m tests.training.trl_peer ../shared/models/stories260k

writes the record that our loss is compared with where it is not.
"""

import importlib.metadata
import json
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ivl_jax.composed.network import Composition, Network
from ivl_jax.composition import SCHEMES
from ivl_jax.config import PreferenceConfig
from ivl_jax.data.batching import Batch, lay_out_rows
from ivl_jax.data.chat import make_chat_format
from ivl_jax.data.formats import Message
from ivl_jax.model.decoder import build_decoder, hidden_states, logits_from_hidden
from ivl_jax.training.loss import Loss, count_tokens, loss_sum
from ivl_jax.training.objectives.dpo import make_dpo
from ivl_jax.weights.language_model import load_language_model

RECORD = Path(__file__).resolve().parent.parent / "fixtures" / "trl_dpo.json"
OPTIONS = {
    "sigmoid": PreferenceConfig(beta=0.1),
    "sigmoid, β = 0.5": PreferenceConfig(beta=0.5),
    "ipo": PreferenceConfig(loss="ipo", beta=0.1),
}
PAIRS = (
    ("What did Lily find?", "She found a big red ball.", "Once upon a time"),
    ("Who is Tom?", "A little boy.", "Tom is the name of a happy cat in the park."),
    ("Why was the bird sad?", "It could not fly.", "The sun."),
)
# Ours → TRL's name of a figure.
FIGURES = {
    "reward_margin": "rewards/margins",
    "reward_accuracy": "rewards/accuracies",
    "chosen_reward": "rewards/chosen",
    "rejected_reward": "rewards/rejected",
    "chosen_log_prob": "logps/chosen",
    "rejected_log_prob": "logps/rejected",
}


class Case(NamedTuple):
    """Preferences in tokens, and the model that is base and value network."""

    network: Network
    params: Any
    chosen: list[tuple[np.ndarray, np.ndarray]]  # tokens and loss mask
    rejected: list[tuple[np.ndarray, np.ndarray]]


class Result(NamedTuple):
    """A loss, its figures by our names, and its gradient by parameter."""

    loss: float
    figures: dict[str, float]
    gradient: Any

    def to_json(self) -> dict[str, Any]:
        """Of each gradient its norm and its product with a fixed vector."""
        gradient = {
            jax.tree_util.keystr(path): _describe(np.asarray(leaf))
            for path, leaf in jax.tree_util.tree_leaves_with_path(self.gradient)
        }
        return {"loss": self.loss, "figures": self.figures, "gradient": gradient}


def _describe(leaf: np.ndarray) -> list[float]:
    flat = leaf.astype(np.float64).ravel()
    return [float(np.linalg.norm(flat)), float(flat @ np.cos(np.arange(flat.size)))]


def make_case(folder: Path) -> Case:
    model = load_language_model(folder)
    network = Network(build_decoder(model.arch), model.arch, model.tokenizer_info.vocab_size)
    chat = make_chat_format(model.tokenizer, template="plain")

    def dialogues(answer: int) -> list[tuple[np.ndarray, np.ndarray]]:
        return [
            chat.encode_dialogue([Message("user", pair[0]), Message("assistant", pair[answer])])
            for pair in PAIRS
        ]

    return Case(network, model.params, dialogues(1), dialogues(2))


def ours(case: Case, options: PreferenceConfig) -> Result:
    """Our loss of all pairs, packed into two rows of segments."""
    pairs = [side for pair in zip(case.chosen, case.rejected, strict=True) for side in pair]
    rows = [pairs[:4], pairs[4:]]
    length = max(sum(len(tokens) - 1 for tokens, _ in row) for row in rows)
    batch = jax.tree.map(jnp.asarray, lay_out_rows(rows, sequence_length=length, pad_id=0))
    value = case.network.__class__(
        case.network.graphdef,
        case.network.arch,
        case.network.vocab_size,
        scheme=SCHEMES["residual"],
    )
    # Several chunks of positions, as in long rows.
    loss = Loss(Composition(case.network, (value,)), make_dpo(options), chunk_length=17)

    def total(params: Any, base: Any, batch: Batch) -> Any:
        summed, count, sums = loss_sum(loss, params, base, batch, counts=count_tokens(loss, batch))
        return summed / count, (count, sums)

    step = jax.jit(jax.value_and_grad(total, has_aux=True))
    (_, (count, sums)), gradient = step(case.params, case.params, batch)
    figures = {name: float(sums[a] / sums[b]) for name, (a, b) in loss.figures.items() if a in sums}
    return Result(float(sums["loss"] / count), {name: figures[name] for name in FIGURES}, gradient)


def theirs(case: Case, options: PreferenceConfig) -> Result:
    """TRL's loss, with the chosen answers in the first rows and the rejected ones after them."""
    import torch

    rows = [*case.chosen, *case.rejected]
    length = max(len(tokens) for tokens, _ in rows)
    ids = np.zeros((len(rows), length), np.int32)
    mask = np.zeros((len(rows), length), np.int64)
    for row, (tokens, counted) in enumerate(rows):
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, counted

    def logits(params: Any) -> jax.Array:
        where = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), ids.shape)
        states, _ = hidden_states(case.network.graphdef, params, jnp.asarray(ids), positions=where)
        return logits_from_hidden(case.network.graphdef, params, states)

    value, pull_back = jax.vjp(jax.jit(logits), case.params)
    base = torch.from_numpy(np.array(value))
    trained, reference = _logits_module(torch, base, base), _logits_module(torch, base, None)
    trainer = _trainer(trained, reference, options)
    inputs = {
        "input_ids": torch.from_numpy(ids.astype(np.int64)),
        "attention_mask": torch.ones(ids.shape, dtype=torch.long),
        "completion_mask": torch.from_numpy(mask),
    }
    loss = trainer._compute_loss(trained, inputs, return_outputs=False)
    loss.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    (gradient,) = pull_back(jnp.asarray(trained.value.grad.numpy()))
    figures = {name: float(metrics[theirs]) for name, theirs in FIGURES.items()}
    return Result(float(loss.detach()), figures, gradient)


def _logits_module(torch: Any, base: Any, value: Any) -> Any:
    """A model whose logits are base + value, the value logits its only parameter."""

    class Logits(torch.nn.Module):
        is_gradient_checkpointing = False

        def __init__(self) -> None:
            super().__init__()
            self.value = None if value is None else torch.nn.Parameter(value.clone())

        def forward(self, input_ids: Any, labels: Any, **_: Any) -> Any:
            logits = (base if self.value is None else base + self.value)[:, :-1]
            log_p, wanted = logits.log_softmax(-1), labels[:, 1:]
            of_wanted = log_p.gather(-1, wanted.clamp(min=0)[..., None])[..., 0]
            return SimpleNamespace(
                log_probs=torch.where(wanted >= 0, of_wanted, 0.0),
                entropy=-(log_p.exp() * log_p).sum(-1),
                mean_logits=logits.mean(-1),
                is_top1=logits.argmax(-1) == wanted,
            )

    return Logits()


def _trainer(model: Any, reference: Any, options: PreferenceConfig) -> Any:
    """A `DPOTrainer` without the parts that read data and devices."""
    from trl import DPOTrainer

    def unchanged(tensor: Any) -> Any:
        return tensor

    trainer: Any = DPOTrainer.__new__(DPOTrainer)
    settings = {
        "model": model.train(),
        "ref_model": reference,
        "accelerator": SimpleNamespace(
            device="cpu", gather=unchanged, gather_for_metrics=unchanged
        ),
        "args": SimpleNamespace(gradient_checkpointing_kwargs=None),
        "beta": options.beta,
        "loss_types": [options.loss],
        "loss_weights": [1.0],
        "label_smoothing": 0.0,
        "f_divergence_type": "reverse_kl",
        "ld_alpha": None,
        "aux_loss_enabled": False,
        "use_weighting": False,
        "precompute_ref_logps": False,
        "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    for name, value in settings.items():
        setattr(trainer, name, value)
    return trainer


def main() -> None:
    case = make_case(Path(sys.argv[1]))
    versions = {name: importlib.metadata.version(name) for name in ("trl", "torch")}
    record = {
        "versions": versions,
        "results": {name: theirs(case, options).to_json() for name, options in OPTIONS.items()},
    }
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
