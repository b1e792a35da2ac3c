"""A value network as a model folder, from which another training can start.

In: a value folder. Out: the model folder.
"""

from pathlib import Path

from ivl_jax.checkpoint import load_value
from ivl_jax.checkpoint.hugging_face import export_hugging_face
from ivl_jax.data.templates import standalone_template


def write_value_as_model(value: Path, folder: Path) -> None:
    """Write a value network as a model folder.

    Args:
        value: Value folder.
        folder: The model folder.
    """
    network = load_value(value)
    template = standalone_template(network.tokenizer, network.chat_template)
    export_hugging_face(network, folder, dtype="float32", chat_template=template)
