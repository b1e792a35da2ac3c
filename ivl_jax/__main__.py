"""`python -m ivl_jax`: lists the commands."""

import sys

from ivl_jax.command_line.guard import version_line

COMMANDS = {
    "ivl-train": "train a value network beside a frozen base, or fine-tune a model alone",
    "ivl-infer": "decode with a base and value networks",
    "ivl-serve": "serve a base and value networks over HTTP, as OpenAI's API",
    "python -m ivl_jax.plan": "whether a run fits a TPU or GPU that is not attached",
    "python -m ivl_jax.evaluation": "transfer, likelihood, GSM8K, MT-Bench, ToxiGen, lm-eval",
    "python -m ivl_jax.vocabulary": "build and show maps between two tokenizers",
    "python -m ivl_jax.checkpoint": "export value folders and Hugging Face folders",
    "python -m ivl_jax.experiments.demo": "the demo: train on S, lift L and X",
    "python -m ivl_jax.experiments": "comparisons at the family's size; `post_training`, `real`",
    "python -m ivl_jax.experiments.demo_post_training": "pairs and prompts for the demo configs",
    "python -m ivl_jax.experiments.finetune_sweep": "fine-tune a target fully, for comparison",
    "python -m ivl_jax.experiments.pretrain_family": "pre-train the embedded family again",
}
"""Command → what it does; each has `--help` and `--version`."""


def main() -> int:
    """Show the table, whatever the arguments.

    Returns:
        The exit status: 0, or 2 where arguments were given that mean nothing here.
    """
    unknown = [word for word in sys.argv[1:] if word not in ("-h", "--help", "--version")]
    width = max(map(len, COMMANDS))
    lines = [f"{name:{width}}  {about}" for name, about in COMMANDS.items()]
    head = [version_line(), "", "Commands; each has --help:"]
    (sys.stderr if unknown else sys.stdout).write("\n".join([*head, *lines]) + "\n")
    if unknown:
        sys.stderr.write(f"python -m ivl_jax: {unknown[0]} is not an argument of it\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
