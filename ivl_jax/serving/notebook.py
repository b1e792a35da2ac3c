"""The server's page inside a notebook.

In: the flags of ivl-serve. Out: a server in a thread of this process, and its page below the cell.
A second process could not use the accelerator that the notebook holds.
"""

import dataclasses
import sys
from collections.abc import Sequence

from ivl_jax.config import ServeConfig
from ivl_jax.serving.background import BackgroundServer
from ivl_jax.serving.hosts import ANY_HOST
from ivl_jax.serving.server import prepare

# Who may show the page in a frame, around which it could have its user click anything: a notebook
# of this machine, at any port, or one of VS Code.
_NOTEBOOKS = ("http://localhost:*", "http://127.0.0.1:*", "vscode-webview:")
# Colab shows outputs in frames of two hosts of its own.
_COLAB = (
    "https://colab.research.google.com",
    "https://*.googleusercontent.com",
    "https://*.colab.dev",
)


class NotebookServer(BackgroundServer):
    """A server of the notebook's own process, which runs until it is closed.

    Args:
        config: the flags; `port=0` takes any free port.
        origins: of the notebook, where it is not one of this machine, of VS Code or of Colab, such
            as `http://workstation:8888`: only its pages may show the server's page in a frame.

    Attributes:
        port: The port it listens on.

    Raises:
        ConfigError: flags that do not fit, or a port that is taken.
        FileNotFoundError: no such base model or value folder.
        ValueError: models that do not fit each other, or weights.
        RuntimeError: the server has failed to start.

    Example:
        server = NotebookServer(ServeConfig(model=ComposedModelConfig(base=BASE, value=(VALUE,)),
                                            port=0))
        server.show()
    """

    def __init__(self, config: ServeConfig, *, origins: Sequence[str] = ()) -> None:
        known = _NOTEBOOKS
        if "google.colab" in sys.modules:
            # Its proxy asks by names that are not documented; no browser runs on its machine.
            known, config = _COLAB, dataclasses.replace(config, allowed_hosts=(ANY_HOST,))
        super().__init__(prepare(config, framed_by=(*known, *origins)))

    def show(self, *, height: int = 640) -> None:
        """Show the page below the cell: in a Colab notebook through its proxy.

        Args:
            height: of the frame, in pixels.
        """
        if "google.colab" in sys.modules:
            from google.colab import output  # pyright: ignore[reportMissingImports]

            output.serve_kernel_port_as_iframe(self.port, height=str(height))
            return
        from IPython.display import IFrame, display

        display(IFrame(f"http://127.0.0.1:{self.port}/", "100%", height))
