"""The card of a value folder: `README.md`, as the hub's model pages show it.

In: the folder's metadata, and what its training run recorded. Out: Markdown with YAML front matter.
The card is for people: it is not sealed by the manifest, and no program reads it back.
"""

import json
import logging
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from etils import epath

from ivl_jax.checkpoint.value_metadata import ValueMetadata
from ivl_jax.config import ConfigError, load_config
from ivl_jax.json_files import parse_json
from ivl_jax.paths import usable_path, write_atomically

logger = logging.getLogger(__name__)

CARD_NAME = "README.md"
UNSEALED = frozenset({CARD_NAME, ".gitattributes"})
"""Files of a value folder that anybody may add, edit or lose: the card, and the hub's own."""

_LICENCE = """\
# license: name one before you publish this folder, such as apache-2.0, and remove the "#". The
# licences of the base model and of the training data may limit the choice.
# license_name: only with license: other
# license_link: only with license: other"""


@dataclass(frozen=True)
class TrainingFacts:
    """What a run knows about its value network beyond the metadata.

    Attributes:
        objective: what was minimised, such as `sft`.
        data: files and datasets of the training demonstrations.
        held_out: figures of the held-out evaluation at the network's step; empty without one.
    """

    objective: str
    data: tuple[str, ...]
    held_out: Mapping[str, float] = field(default_factory=dict)


def read_training_facts(run_dir: epath.PathLike, step: int) -> TrainingFacts | None:
    """Read what a run directory records about the value network of a step.

    Args:
        run_dir: the run directory.
        step: steps that the network was trained.

    Returns:
        The facts; None if its config cannot be read, which is logged: a card is never a reason to
        lose a value network.
    """
    run_dir = usable_path(run_dir)
    metrics = run_dir / "metrics.jsonl"
    try:
        config = load_config(str(run_dir / "config.toml"))
        lines = metrics.read_bytes().splitlines() if metrics.exists() else []
    except (ConfigError, OSError) as error:
        logger.warning("the value folder's card says nothing of its training: %s", error)
        return None
    held_out: dict[str, float] = {}
    for line in lines:
        try:
            record = parse_json(line, metrics)
        except ValueError:
            continue  # the line that a killed process was writing
        if isinstance(record, dict) and record.get("step") == step:
            held_out = _numbers(record.get("held_out")) or held_out
    return TrainingFacts(config.objective, tuple(config.data.train), held_out)


def _numbers(figures: Any) -> dict[str, float]:
    found = figures if isinstance(figures, dict) else {}
    return {name: value for name, value in found.items() if type(value) in (int, float)}


def value_card(metadata: ValueMetadata, facts: TrainingFacts | None = None) -> str:
    """Write the card of a value folder.

    Args:
        metadata: content of its `ivl.json`.
        facts: from its training run, or None if there was none.

    Returns:
        The content of `README.md`.
    """
    base = metadata.training_base.get("name", "")
    sections = [
        _front_matter(metadata),
        f"# Value network for {_code(base) if base else 'a base model'}",
        "Trained by inverse value learning: the base model's weights stay as they are, and the "
        "value network's logits are added to the base's, z = z_base + α · z_value, with a "
        "strength α chosen at decoding. This folder holds the value network and its tokenizer; "
        "the base is not included.",
        _table(("", ""), _rows(metadata, facts)),
    ]
    if facts is not None and facts.held_out:
        sections += ["## Held-out figures", _figures(metadata.steps, facts.held_out)]
    sections += ["## How to use it", _usage(metadata, base or "BASE")]
    sections += [
        "## Licence",
        "Not stated. Whoever publishes this folder names one in the first lines of this file "
        "(`license`) and here, with what the base model and the training data require.",
    ]
    return "\n\n".join(sections) + "\n"


def write_card(
    folder: epath.PathLike, metadata: ValueMetadata, facts: TrainingFacts | None = None
) -> None:
    """Write the card into a value folder, in place of an earlier one; process 0 does.

    Args:
        folder: the value folder.
        metadata: content of its `ivl.json`.
        facts: from its training run, or None if there was none.
    """
    import jax  # here: whoever only reads `UNSEALED` needs none of it

    if jax.process_index() == 0:
        write_atomically(usable_path(folder) / CARD_NAME, value_card(metadata, facts).encode())


def _front_matter(metadata: ValueMetadata) -> str:
    """The block of YAML that the hub reads; a base that is not on the hub is left out."""
    from huggingface_hub import ModelCardData

    bases = [name for name in _base_names(metadata) if _is_hub_id(name)]
    data = ModelCardData(
        library_name="ivl_jax",
        base_model=bases or None,
        base_model_relation="adapter" if bases else None,
        pipeline_tag="text-generation",
        tags=["ivl_jax", "value-network", "inverse-value-learning", metadata.connection],
    )
    return f"---\n{data.to_yaml()}\n{_LICENCE}\n---"


def _base_names(metadata: ValueMetadata) -> list[str]:
    return metadata.training_base.get("name", "").split(" and ")


def _is_hub_id(name: str) -> bool:
    """Whether a base's name is `owner/name`, and not a local folder's path of that form."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not Path(name).exists()


def _rows(metadata: ValueMetadata, facts: TrainingFacts | None) -> list[tuple[str, str]]:
    base, penalty = metadata.training_base, metadata.penalty
    rows = [("trained with the base", _code(base.get("name") or "unknown"))]
    if base.get("fingerprint"):
        rows.append(("fingerprint of the base's weights", _code(base["fingerprint"])))
    rows.append(("connection scheme", _code(metadata.connection)))
    depths = metadata.architecture.get("head_depths", 1)
    if depths != 1:
        rows.append(("its head reads", f"a mixture of its last {depths} layers"))
    if metadata.adapter is not None:
        model, rank = metadata.adapter["model"]["name"], metadata.adapter["rank"]
        rows.append(("low-rank adapter of", f"{_code(model)}, rank {rank}; not included"))
    if facts is not None:
        rows.append(("objective", _code(facts.objective)))
        rows.append(("training data", ", ".join(_code(name) for name in facts.data)))
    rows.append(("optimizer steps", f"{metadata.steps:,}"))
    if penalty:
        shown = ", ".join(f"{name} {_code(value)}" for name, value in penalty.items())
        rows.append(("penalty on z_value", shown))
    template = metadata.chat_template
    written_out = "\n" in template or "{" in template
    rows.append(("prompt format", "a template of its own" if written_out else _code(template)))
    rows.append(("vocabulary", f"{metadata.tokenizer['vocab_size']:,} tokens"))
    rows.append(("written by ivl_jax", metadata.library_versions.get("ivl_jax", "unknown")))
    return rows


def _figures(steps: int, figures: Mapping[str, float]) -> str:
    """Figures of the last evaluation, the base's own beside them where there are such."""
    pairs = {name.removeprefix("base_") for name in figures if name.startswith("base_")}
    compared = [name for name in figures if name in pairs]
    text = (
        f"After {steps:,} steps, on the held-out demonstrations of the run (NLL in nats per token)."
    )
    if compared:
        rows = [
            (_words(name), _number(figures[f"base_{name}"]), _number(figures[name]))
            for name in compared
        ]
        text += "\n\n" + _table(("", "base alone", "base with value network"), rows)
    if "nll" in compared and figures["base_nll"] > 0:
        text += f"\n\nRatio of the two NLLs: {figures['nll'] / figures['base_nll']:.3f}."
    others = [
        (_words(name), _number(value))
        for name, value in figures.items()
        if name not in compared and name.removeprefix("base_") not in compared
    ]
    return text + ("\n\n" + _table(("figure", "value"), others) if others else "")


def _usage(metadata: ValueMetadata, base: str) -> str:
    scheme = metadata.connection
    own = ":" in scheme
    flag = f" --connection {scheme}" if own else ""
    of_python = f", schemes={{{scheme!r}: …}}" if own else ""
    return (
        "With `ivl_jax` installed; `VALUE` is this folder:\n\n"
        "```sh\n"
        f"ivl-infer --base {shlex.quote(_plain(base))} --value VALUE --strength 1.0{flag} "
        '--chat --prompt "…"\n'
        "```\n\n"
        "```python\n"
        "import ivl_jax\n\n"
        f"base = ivl_jax.load_model({json.dumps(_plain(base), ensure_ascii=False)})\n"
        'value = ivl_jax.load_value("VALUE")\n'
        f"model = ivl_jax.compose(base, value{of_python})\n"
        'print(model.generate([[ivl_jax.Message("user", "…")]])[0].text)\n'
        "```\n\n" + " ".join([_fitting_bases(metadata), *_of_adapter(metadata)])
    )


def _fitting_bases(metadata: ValueMetadata) -> str:
    """Which bases it can be added to: that is decided by what its scheme reads."""
    from ivl_jax.composition import SCHEMES  # here: it imports JAX

    scheme = SCHEMES.get(metadata.connection)
    if scheme is None:
        return (
            "Its connection scheme is not one of `ivl_jax`'s own: it needs the module that defines "
            "it, and which bases work is up to what it reads."
        )
    if not scheme.reads_base:
        return (
            "It reads only the text. Any base with the same tokenizer works, larger ones too; for "
            "one with another vocabulary, `python -m ivl_jax.vocabulary build` makes a map, which "
            "`--map` names."
        )
    if scheme.reads_base_hidden:
        width = metadata.architecture.get("base_hidden_size")
        reads = "final hidden states"
        bases = f"the same tokenizer and hidden states of width {width} works"
    else:
        reads, bases = "logits", "the same tokenizer works, larger ones too"
    return (
        f"It reads the base's {reads}. Any base with {bases}; one with another vocabulary "
        "does not (a map cannot translate what it reads), and nothing can draft (`--draft`)."
    )


def _of_adapter(metadata: ValueMetadata) -> list[str]:
    if metadata.adapter is None:
        return []
    name = _code(metadata.adapter["model"]["name"])
    return [
        f"The adapter's model is read from {name}, or from the folder that `--value-model` names "
        "(in Python: `load_value(…, value_model=…)`)."
    ]


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _code(value: Any) -> str:
    """A value as code in a table, on one line whatever it contains."""
    return f"`{_plain(value).replace('`', '')}`".replace("|", "\\|")


def _plain(value: Any) -> str:
    return " ".join(str(value).split())


def _words(name: str) -> str:
    return {"nll": "NLL", "mean_abs_value": "mean \\|z_value\\|"}.get(name, name.replace("_", " "))


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
