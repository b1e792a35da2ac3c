"""Sizes of a mesh: filled in, or an error that lists sizes that fit."""

import math

import pytest

from ivl_jax.mesh_sizes import fitting_sizes, mesh_sizes


def sizes(data, fsdp, tensor):
    return {"data": data, "fsdp": fsdp, "tensor": tensor}


@pytest.mark.parametrize(
    ("wanted", "options", "expected"),
    [
        ((1, -1, 1), {}, (1, 8, 1)),
        ((-1, 2, 2), {}, (2, 2, 2)),
        ((2, 2, 2), {}, (2, 2, 2)),
        ((1, 2, 1), {}, (1, 2, 1)),  # a part of the devices
        ((2, -1, 1), {"slices": 2}, (2, 4, 1)),
        ((-1, 1, 4), {"slices": 2}, (2, 1, 4)),
    ],
)
def test_sizes_that_fit_are_filled_in(wanted, options, expected):
    assert mesh_sizes(sizes(*wanted), devices=8, **options) == sizes(*expected)


@pytest.mark.parametrize(
    ("wanted", "options", "message"),
    [
        (
            (3, -1, 1),
            {},
            "mesh data=3, fsdp=-1, tensor=1 does not fit 8 devices; these sizes do: data=4, "
            "fsdp=2, tensor=1; data=2, fsdp=4, tensor=1; data=8, fsdp=1, tensor=1; data=1, fsdp=8",
        ),
        ((4, 4, 1), {}, "these sizes do: data=2, fsdp=4, tensor=1; data=4, fsdp=2, tensor=1; "),
        ((1, 2, 1), {"all_used": True}, "these sizes do: data=1, fsdp=2, tensor=4; data=1, fsdp=8"),
        ((1, -1, 1), {"slices": 2}, "8 devices in 2 slices (data must be a multiple of 2: only"),
        ((2, 2, 1), {"slices": 2}, "data=2, fsdp=2, tensor=2; "),
        ((1, 1, 2), {"devices": 1}, "does not fit 1 device; these sizes do: data=1, fsdp=1, tens"),
        ((-1, -1, 1), {}, "or −1 on one axis"),
        ((0, 1, 1), {}, "must be ≥ 1"),
        ((1, -2, 1), {}, "must be ≥ 1"),
    ],
)
def test_sizes_that_do_not_fit_are_an_error_that_lists_others(wanted, options, message):
    with pytest.raises(ValueError, match="mesh ") as error:
        mesh_sizes(sizes(*wanted), **{"devices": 8, **options})
    assert message in str(error.value)


def test_every_listed_size_uses_all_devices_and_is_listed_once():
    found = fitting_sizes(sizes(1, -1, 1), devices=48, slices=3)
    assert all(math.prod(one.values()) == 48 and one["data"] % 3 == 0 for one in found)
    assert len({tuple(one.values()) for one in found}) == len(found) == 15
    assert found[0] == sizes(3, 16, 1)
