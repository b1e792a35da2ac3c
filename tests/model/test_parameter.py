"""One declaration per parameter: axes, first values and tensors in files follow from it."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from ivl_jax.model.assembly import abstract_params, parameter_declarations
from ivl_jax.model.decoder import build_decoder
from ivl_jax.model.linear_map import LinearMapConfig
from ivl_jax.model.linear_map import parameter_declarations as map_declarations
from ivl_jax.model.network import abstract_network, declared_axes, vocabulary_dimensions
from ivl_jax.model.parameter import Declaration, abstract_tree, declarations, declare, static_half
from ivl_jax.model.projection import AS_TRAINED, KernelForm
from tests.model.families import NAMES, tiny_arch

SWITCHES = ("attention_bias", "attention_output_bias", "qk_norm", "post_norms")


class Gate(nnx.Module):
    """A module of somebody else's, with a parameter of its own."""

    def __init__(self):
        self.gain = declare((None, 3), initial="ones")
        self.table = declare(("embed", 4), ("mlp", 3), dtype=jnp.int8, hf_suffix=None)


def test_a_declaration_gives_shape_dtype_axes_and_first_values():
    assert declarations(Gate()) == {
        ("gain",): Declaration((None,), "ones", None, "weight", False, None),
        ("table",): Declaration(("embed", "mlp"), "normal", jnp.dtype(jnp.int8), None, False, None),
    }
    assert abstract_tree(Gate(), jnp.bfloat16) == {
        "gain": jax.ShapeDtypeStruct((3,), jnp.bfloat16),
        "table": jax.ShapeDtypeStruct((4, 3), jnp.int8),
    }


def test_the_static_half_is_as_small_as_if_nothing_had_been_declared():
    class Bare(nnx.Module):
        def __init__(self):
            self.gain = nnx.Param(jax.ShapeDtypeStruct((3,), jnp.float32))
            self.table = nnx.Param(jax.ShapeDtypeStruct((4, 3), jnp.int8))

    bare = nnx.split(Bare())[0]
    assert [node.metadata for node in static_half(Gate()).nodes[1:]] == [
        node.metadata for node in bare.nodes[1:]
    ]


@pytest.mark.parametrize("form", [AS_TRAINED, KernelForm(int8=True)], ids=["floats", "int8"])
@pytest.mark.parametrize("switch", [None, *SWITCHES])
@pytest.mark.parametrize("name", NAMES)
def test_axes_are_known_of_every_parameter_a_decoder_can_have(name, switch, form):
    arch = tiny_arch(name)
    if switch:
        valid = {"qk_norm": {"joint_qk_norm": False}, "post_norms": {"pre_norms": True}}
        changes = valid.get(switch, {}) | {switch: not getattr(arch, switch)}
        arch = dataclasses.replace(arch, **changes)
    shapes = jax.tree_util.tree_leaves_with_path(abstract_params(arch, form=form))
    shapes = {tuple(key.key for key in path): leaf for path, leaf in shapes}
    declared = parameter_declarations(arch, form=form)
    assert set(declared) == set(shapes)
    for path, declaration in declared.items():
        assert len(declaration.axes) == shapes[path].ndim
        names = path[2:] if path[0] == "layers" else path
        assert declared_axes()[".".join(names)] == declaration.axes


@pytest.mark.parametrize("rank", [0, 1])
def test_a_linear_map_shares_the_paths_it_has_in_common_with_a_decoder(rank):
    for path, declaration in map_declarations(LinearMapConfig(5, rank)).items():
        assert declared_axes()[".".join(map(str, path))] == declaration.axes


def test_the_vocabulary_is_where_more_rows_make_a_parameter_longer():
    tied, untied = tiny_arch("llama3"), tiny_arch("llama2")
    assert vocabulary_dimensions(tied) == {"embed_tokens.embedding": (0,)}
    assert vocabulary_dimensions(untied) == {
        "embed_tokens.embedding": (0,),
        "lm_head.kernel": (1,),
    }
    assert vocabulary_dimensions(LinearMapConfig(5, 2)) == {
        "down_proj.kernel": (0,),
        "lm_head.kernel": (1,),
    }
    assert vocabulary_dimensions(LinearMapConfig(5)) == {"lm_head.kernel": (0, 1)}


def test_only_int8_kernels_and_their_scales_have_a_dtype_of_their_own():
    shapes = abstract_network(
        tiny_arch("llama_bias"), param_dtype=jnp.bfloat16, form=KernelForm(int8=True)
    )
    q_proj = shapes["layers"][0]["self_attn"]["q_proj"]
    assert {name: str(leaf.dtype) for name, leaf in q_proj.items()} == {
        "kernel": "int8",
        "scale": "float32",
        "bias": "bfloat16",
    }
    assert build_decoder(tiny_arch("llama_bias")) is build_decoder(tiny_arch("llama_bias"))
