"""`python -m ivl_jax.checkpoint`: checkpoint → value folder → Hugging Face folder, or the hub.

In: a command line. Out: the folder it names, one line on stdout, or the error on stderr.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from ivl_jax.command_line.console import log_to_stderr
from ivl_jax.command_line.guard import FAILED, run_command
from ivl_jax.paths import local_path, usable_path

PlainDType = Literal["float32", "bfloat16"]

_PROGRAM = "python -m ivl_jax.checkpoint"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the command line without the program's name; None: this process's.

    Returns:
        The exit status; 1 where a folder cannot be used or written.
    """
    return run_command(_PROGRAM, _run, arguments, failure_status=FAILED)


def _run(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog=_PROGRAM)
    commands = parser.add_subparsers(dest="command", required=True)

    value = commands.add_parser("export-value", help="make a value folder from a run's checkpoint")
    value.add_argument("run_dir", help="the run directory; with --merge also a LoRA value folder")
    value.add_argument("out", help="the value folder to write")
    value.add_argument(
        "--step", default="latest", type=_which, help="a step, best or latest (default: latest)"
    )
    value.add_argument("--overwrite", action="store_true", help="replace a value folder there")
    value.add_argument(
        "--merge", action="store_true", help="merge an adapter into its model: a plain value folder"
    )
    value.add_argument(
        "--safetensors",
        metavar="FOLDER",
        help="write it also as a model folder that transformers loads; only of residual networks",
    )
    _add_value_model(value)

    hugging_face = commands.add_parser(
        "export-hf", help="write a value network as a Hugging Face model folder"
    )
    hugging_face.add_argument("value", help="the value folder")
    hugging_face.add_argument("out", help="the Hugging Face folder to write")
    hugging_face.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    hugging_face.add_argument("--overwrite", action="store_true", help="replace a folder there")
    _add_value_model(hugging_face)

    push = commands.add_parser("push", help="upload a value folder to the Hugging Face hub")
    push.add_argument("value", help="the value folder")
    push.add_argument("repository", help="owner/name on the hub; created if there is none")
    push.add_argument("--revision", help="branch, created if there is none (default: main)")
    push.add_argument("--private", action="store_true", help="make a new repository private")

    chosen = parser.parse_args(arguments)
    log_to_stderr()
    run = {"export-value": _export_value, "export-hf": _export_hf, "push": _push}[chosen.command]
    line = run(chosen)
    sys.stdout.write(f"{line}\n")
    return 0


def _add_value_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--value-model", help="the model of an adapter, if it is not where the value folder says"
    )


def _which(text: str) -> str | int:
    if text not in ("best", "latest") and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a step, best or latest, got {text!r}")
    return int(text) if text.isdecimal() else text


def _export_value(chosen: argparse.Namespace) -> str:
    from ivl_jax.checkpoint.export import DESCRIPTION_FOLDER, export_value
    from ivl_jax.checkpoint.hugging_face import check_exportable
    from ivl_jax.checkpoint.value_metadata import METADATA_NAME

    folder = chosen.safetensors and local_path(chosen.safetensors, "--safetensors")
    described = usable_path(chosen.run_dir)
    if (described / DESCRIPTION_FOLDER).exists():  # not so of a value folder, with --merge
        described = described / DESCRIPTION_FOLDER
    if folder and (described / METADATA_NAME).exists():
        check_exportable(described, folder, overwrite=chosen.overwrite)
    step = export_value(
        chosen.run_dir,
        chosen.step,
        chosen.out,
        overwrite=chosen.overwrite,
        merge=chosen.merge,
        value_model=chosen.value_model,
    )
    line = f"step {step} of {chosen.run_dir} is in {chosen.out}"
    if not folder:
        return line
    _write_model_folder(chosen, chosen.out, folder, dtype="float32")
    return f"{line}, and as a model that transformers loads in {folder}"


def _export_hf(chosen: argparse.Namespace) -> str:
    from ivl_jax.checkpoint.hugging_face import check_exportable

    out = local_path(chosen.out, "OUT")
    check_exportable(chosen.value, out, overwrite=chosen.overwrite)
    _write_model_folder(chosen, chosen.value, out, dtype=chosen.dtype)
    return (
        f"{chosen.value} is in {out}: its logits are z_value, to be added to a base's "
        "(examples/logits_processor.py)"
    )


def _push(chosen: argparse.Namespace) -> str:
    from ivl_jax.checkpoint.hub import push_to_hub

    commit = push_to_hub(
        chosen.value, chosen.repository, revision=chosen.revision, private=chosen.private
    )
    return f"{chosen.value} is on the hub: {commit}"


def _write_model_folder(
    chosen: argparse.Namespace, value_folder: str, out: Path, *, dtype: PlainDType
) -> None:
    from ivl_jax.checkpoint.hugging_face import export_hugging_face
    from ivl_jax.checkpoint.value_folder import load_value
    from ivl_jax.data.templates import standalone_template

    value = load_value(value_folder, value_model=chosen.value_model)
    export_hugging_face(
        value,
        out,
        dtype=dtype,
        chat_template=standalone_template(value.tokenizer, value.chat_template),
        overwrite=chosen.overwrite,
    )


if __name__ == "__main__":
    sys.exit(main())
