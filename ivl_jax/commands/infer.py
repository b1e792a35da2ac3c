"""Decode with a base model and value networks: flags in, text out.

{program} --base BASE --value VALUE --prompt "Once upon a time"

{program} --base BASE --value VALUE --input prompts.jsonl --output out.jsonl

{program} --base BASE --value VALUE --chat

{program} --base BASE --value A --value B --strength 1 --strength -0.5 --prompt "Once"
"""

from collections.abc import Sequence

from ivl_jax.command_line.console import log_to_stderr
from ivl_jax.command_line.guard import FAILED, WRONG_INPUT, called_as, run_command


class _Stage:
    """How far the command is: decides what a stop or a failure means."""

    decoding = False
    resumable = False

    def when_stopped(self) -> str:
        if not self.decoding:
            return "stopped before anything was decoded"
        return "stopped" + ("; the same command resumes" if self.resumable else "")

    def failure_status(self) -> int:
        return FAILED if self.decoding else WRONG_INPUT


def main() -> int:
    """Run the command line.

    Returns:
        The exit status: 2 where flags, files or models cannot be used, 1 where decoding failed.
    """
    stage = _Stage()
    return run_command(
        called_as(),
        lambda arguments: _infer(arguments, stage),
        when_stopped=stage.when_stopped,
        failure_status=stage.failure_status,
    )


def _infer(arguments: Sequence[str], stage: _Stage) -> int:
    from ivl_jax.config import InferConfig, check_infer_config

    if not arguments:
        check_infer_config(InferConfig())  # answered before the parser of flags is imported
    from ivl_jax.command_line.flags import parse_flags

    log_to_stderr()
    program = called_as()
    description = (__doc__ or "").replace("{program}", program)
    config = parse_flags(InferConfig, arguments, prog=program, description=description)
    check_infer_config(config)
    # Imported after the flags are checked: JAX takes seconds that a wrong flag need not wait for.
    from ivl_jax.decoding import command

    with command.joined(config):
        work = command.prepare(config)
        if work is not None:
            stage.decoding, stage.resumable = True, config.output is not None
            command.decode(work)
    return 0
