"""Serve a base model and value networks over HTTP, as OpenAI's API.

{program} --base BASE --value VALUE

{program} --base BASE --value NAME=FOLDER --value OTHER=FOLDER --map OTHER=FILE --port 8000
"""

import sys
from collections.abc import Sequence

from ivl_jax.command_line.console import log_to_stderr
from ivl_jax.command_line.guard import FAILED, WRONG_INPUT, called_as, run_command


class _Stage:
    """How far the command is: decides what a stop or a failure means."""

    serving = False

    def when_stopped(self) -> str:
        return "stopped serving" if self.serving else "stopped before it was serving"

    def failure_status(self) -> int:
        return FAILED if self.serving else WRONG_INPUT


def main() -> int:
    """Run the command line.

    Returns:
        The exit status: 2 where flags, files or models cannot be used, 1 where serving failed, 128
        and the signal's number where a signal stopped it.
    """
    stage = _Stage()
    return run_command(
        called_as(),
        lambda arguments: _serve(arguments, stage),
        when_stopped=stage.when_stopped,
        failure_status=stage.failure_status,
    )


def _serve(arguments: Sequence[str], stage: _Stage) -> int:
    from ivl_jax.config import ConfigError, ServeConfig, check_serve_config

    if not arguments:
        check_serve_config(ServeConfig())  # answered before the parser of flags is imported
    from ivl_jax.command_line.flags import parse_flags

    log_to_stderr()
    program = called_as()
    description = (__doc__ or "").replace("{program}", program)
    config = parse_flags(ServeConfig, arguments, prog=program, description=description)
    check_serve_config(config)
    # Imported after the flags are checked: JAX takes seconds that a wrong flag need not wait for.
    try:
        from ivl_jax.serving import server
    except ModuleNotFoundError as error:
        if error.name in ("starlette", "uvicorn", "prometheus_client"):
            raise ConfigError(
                f"{error.name} is not installed: pip install 'ivl_jax[serve]' (in a clone: pip "
                "install -e '.[serve]')"
            ) from error
        raise
    prepared = server.prepare(config)
    stage.serving = True
    server.serve(prepared)
    return 0


if __name__ == "__main__":
    sys.exit(main())
