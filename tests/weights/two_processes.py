"""One of two processes that load a checkpoint together, each its share, and save it again.

`python two_processes.py INDEX PORT FOLDER`, run by test_two_processes.py.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.decoder import abstract_params
from ivl_jax.sharding import make_mesh, parameter_shardings
from ivl_jax.weights.hf_checkpoint import load_params
from ivl_jax.weights.hf_saving import save_params


def main(index: int, port: str, folder: Path) -> None:
    """Run this process's part."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=index)
    arch = ArchConfig.from_hf(json.loads((folder / "model" / "config.json").read_text()))
    tensors = load_file(folder / "model" / "model.safetensors")
    for layout in ({"tensor": 4}, {"fsdp": 4}, {"fsdp": 2, "tensor": 2}, {"data": 4}):
        mesh = make_mesh(**layout)
        shardings = parameter_shardings(abstract_params(arch, vocab_rows=64), mesh)
        params = load_params(folder / "model", arch, vocab_rows=64, shardings=shardings)
        kernel = params["layers"][1]["mlp"]["down_proj"]["kernel"]
        expected = tensors["model.layers.1.mlp.down_proj.weight"].T
        assert len(kernel.addressable_shards) == 2
        for shard in kernel.addressable_shards:
            np.testing.assert_array_equal(shard.data, expected[shard.index])
        save_params(folder / "-".join(layout), arch, params, dtype=jnp.float32)
        saved = load_file(folder / "-".join(layout) / "model.safetensors")
        for name, array in tensors.items():
            np.testing.assert_array_equal(saved[name], array, err_msg=name)
    print(f"process {index} done")  # noqa: T201


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
