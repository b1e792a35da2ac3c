"""What configs/demo_dpo, demo_grpo and demo_distil start from, on the embedded family.

`python -m ivl_jax.experiments.demo_post_training`. Out: in `runs/demo_post_training` a value
network of S that was trained on a tenth of the demo's demonstrations, the questions about the
invented facts, and for each of them the right answer beside a wrong one that S and this value
network gave.
"""

import dataclasses
import hashlib
import json
import logging
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ivl_jax.assets import config_file, family_folder
from ivl_jax.checkpoint import load_value
from ivl_jax.checkpoint.hugging_face import export_hugging_face
from ivl_jax.command_line.console import log_to_stdout
from ivl_jax.command_line.flags import parse_flags
from ivl_jax.command_line.guard import long_run_command
from ivl_jax.config import ConfigError, GenerationOptions, TrainConfig, load_config
from ivl_jax.config.files import config_to_toml
from ivl_jax.data.formats import Message
from ivl_jax.data.templates import standalone_template
from ivl_jax.decoding.compose import compose
from ivl_jax.experiments.demonstrations import Item, build_items, select, write_demonstrations
from ivl_jax.experiments.kept_results import train_once
from ivl_jax.experiments.measure import FACT_TOKENS
from ivl_jax.json_files import read_json_object, write_json
from ivl_jax.paths import write_atomically
from ivl_jax.training.loop import run

logger = logging.getLogger(__name__)

_PROGRAM = "python -m ivl_jax.experiments.demo_post_training"
_OPTIONS = "options.json"


@dataclasses.dataclass(frozen=True)
class Options:
    """Train a value network on a part of the demonstrations, and sample wrong answers from it."""

    config: Path = dataclasses.field(default_factory=lambda: config_file("demo.toml"))
    """The training run's settings."""
    run_dir: Path = Path("runs/demo_post_training")
    """Where everything is written; what is there is not made again."""
    share: float = 0.1
    """Share of the training demonstrations that the value network sees."""
    epochs: float = 30.0
    """Passes over that share: after 3 the value network answers nothing, after 30 a fifth of what
    it samples is right, so that there is something to reward."""
    samples: int = 4
    """Answers sampled per question, from which the rejected one is chosen."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None: of this process.

    Returns:
        The exit status.
    """
    return long_run_command(_PROGRAM, _run, arguments)


def some_of(items: Sequence[Item], share: float, *, seed: int = 0) -> list[Item]:
    """A share of the training items, chosen by hash, and all others.

    Args:
        items: of all splits.
        share: of the training items to keep, in (0, 1].
        seed: another seed keeps others.

    Returns:
        The items in order.
    """
    return [item for item in items if item.split != "train" or _draw(item, seed) < share]


def pair_rows(items: Sequence[Item], answers: Sequence[Sequence[str]]) -> list[dict[str, str]]:
    """Preferences of the right answer over a sampled one.

    Args:
        items: Questions.
        answers: Of each question, its sampled answers.

    Returns:
        A row for each question that was answered wrongly at least once: the first wrong answer.

    Example:
        >>> item = Item("Where?", "Here.", "fact", "someone", "test")
        >>> pair_rows([item, item], [["Here.", " There.", "Nowhere."], ["Here."]])
        [{'prompt': 'Where?', 'chosen': 'Here.', 'rejected': 'There.'}]
    """
    rows = []
    for item, given in zip(items, answers, strict=True):
        stripped = (answer.strip() for answer in given)
        wrong = next((one for one in stripped if one and one != item.answer), None)
        if wrong is not None:
            rows.append({"prompt": item.question, "chosen": item.answer, "rejected": wrong})
    return rows


def _run(arguments: Sequence[str]) -> None:
    options = parse_flags(Options, arguments, prog=_PROGRAM)
    log_to_stdout(times=True)
    folder = options.run_dir
    _claim(folder, options)
    items = build_items()
    files = write_demonstrations(folder / "demonstrations", some_of(items, options.share))
    value = _trained_value(options, files)
    facts = [item for item in items if item.kind == "fact"]
    for split, name in (("train", "questions"), ("validation", "questions_held_out")):
        chosen = select(facts, "train" if split == "train" else "validation")
        write_questions(folder / f"{name}.jsonl", chosen)
        pairs = folder / f"{name.replace('questions', 'preferences')}.jsonl"
        if not pairs.exists():
            write_pairs(pairs, chosen, value, samples=options.samples)
    logger.info("written to %s: %s", folder, ", ".join(sorted(p.name for p in folder.iterdir())))


def _claim(folder: Path, options: Options) -> None:
    """Write down the options of a folder, or check that it was made with the same ones."""
    file, config = folder / _OPTIONS, load_config(options.config, TrainConfig)
    wanted = {
        "share": options.share,
        "epochs": options.epochs,
        "samples": options.samples,
        "config": config_to_toml(config),
    }
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, wanted)
        return
    made = read_json_object(file)
    if differing := [key for key, value in wanted.items() if made.get(key) != value]:
        raise ConfigError(
            f"{folder} was made with other options ({', '.join(differing)}; see {file}): name "
            "another --run-dir, or remove it"
        )


def _trained_value(options: Options, files: dict[str, Path]) -> Path:
    """The value folder of S, and beside it the same network as a model folder."""
    run_dir = options.run_dir / "training"
    config, family_s = load_config(options.config, TrainConfig), str(family_folder("S"))
    data = dataclasses.replace(
        config.data,
        train=(str(files["train"]),),
        validation=(str(files["validation"]),),
        data_dir=str(options.run_dir / "data"),
    )
    wanted = dataclasses.replace(
        config,
        run_dir=str(run_dir),
        base=dataclasses.replace(config.base, path=family_s),
        value=dataclasses.replace(config.value, path=family_s),
        data=data,
        step=dataclasses.replace(config.step, epochs=options.epochs),
    )
    output = run_dir / "value"
    train_once("the value network", run_dir, output, config=lambda: wanted, run=run)
    exported = options.run_dir / "value"
    if not exported.exists():
        export_value(output, exported)
    return output


def export_value(value: Path, folder: Path) -> None:
    """Write a value network as a model folder, from which another training can start.

    Args:
        value: Value folder.
        folder: The model folder.
    """
    network = load_value(value)
    template = standalone_template(network.tokenizer, network.chat_template)
    export_hugging_face(network, folder, dtype="float32", chat_template=template)


def write_questions(path: Path, items: Sequence[Item]) -> None:
    """Write questions with their right answers, as `format = "messages"` reads them."""
    _write(path, (_dialogue(item) for item in items))


def write_pairs(
    path: Path, items: Sequence[Item], value: Path, *, samples: int, seed: int = 0
) -> None:
    """Write the right answers beside wrong ones that S with a value network gives.

    Args:
        path: JSONL file.
        items: Questions.
        value: Value folder.
        samples: Answers sampled per question, from which the rejected one is chosen.
        seed: Of sampling.
    """
    model = compose(str(family_folder("S")), str(value))
    options = GenerationOptions(max_new_tokens=FACT_TOKENS, temperature=1.0, seed=seed)
    asked = [(Message("user", item.question),) for item in items for _ in range(samples)]
    generations = model.generate_prepared(model.prepare(asked, options), batch_size=64)
    texts = [one.text for one in generations]
    answers = [texts[start : start + samples] for start in range(0, len(texts), samples)]
    _write(path, pair_rows(items, answers))


def _dialogue(item: Item) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": item.question},
            {"role": "assistant", "content": item.answer},
        ],
        "group": item.group,
    }


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(path, text.encode())


def _draw(item: Item, seed: int) -> float:
    drawn = f"share {seed}" if seed else "share"
    digest = hashlib.sha256(f"{item.question}\0{drawn}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


if __name__ == "__main__":
    sys.exit(main())
