"""Bytes between devices are counted in the text of compiled programs."""

import pytest

from ivl_jax.plan.collectives import count_collectives

_HEAD = "HloModule jit_step, is_scheduled=true\n\n"


def program(body, *, more=""):
    """An entry of these lines, after other computations."""
    return f"{_HEAD}{more}\nENTRY %main.1 (x: f32[64]) -> f32[64] {{\n{body}\n}}\n"


@pytest.mark.parametrize(
    ("line", "kind", "expected"),
    [
        # 256 bytes in groups of 4: all but a quarter of them are sent.
        (
            "%y = f32[64]{0:T(128)} all-gather(%x), replica_groups={{0,1,2,3},{4,5,6,7}}",
            "all-gather",
            192,
        ),
        (
            "%y = f32[64]{0} all-reduce(%x), replica_groups=[2,4]<=[8], to_apply=%add",
            "all-reduce",
            384,
        ),
        (
            "%y = f32[16]{0} reduce-scatter(%x), replica_groups=[4,2]<=[8], to_apply=%add",
            "reduce-scatter",
            64,
        ),
        ("%y = bf16[64]{0} all-to-all(%x), replica_groups={}", "all-to-all", 112),
        (
            "%y = f32[64]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}",
            "collective-permute",
            256,
        ),
        (
            "%y = pred[64]{0} all-gather(%x), replica_groups=mesh['a'=2,'b'=4] {'b'}",
            "all-gather",
            48,
        ),
        (
            "%y = s8[64]{0} all-gather(%x), replica_groups=mesh['a'=2,'b'=4] {'a','b'}",
            "all-gather",
            56,
        ),
        # Tuples: the sum of several arrays, or operand and result of one that only starts here.
        (
            "%y = (f32[32]{0}, /*index=1*/f32[32]{0}) all-reduce(%x, %x), replica_groups={}",
            "all-reduce",
            448,
        ),
        (
            "%y = (f32[16]{0}, f32[64]{0}) all-gather-start(%x), replica_groups=[2,4]<=[8]",
            "all-gather",
            192,
        ),
        (
            "%y = (f32[64]{0}, f32[64]{0}, u32[], u32[]) collective-permute-start(%x)",
            "collective-permute",
            256,
        ),
    ],
)
def test_each_kind_is_counted_as_a_ring_sends_it(line, kind, expected):
    assert count_collectives(program(f"  ROOT {line}"), devices=8).sent == {kind: expected}


_LOOP = """\
%body (p: (f32[64])) -> (f32[64]) {
  %g = f32[64]{0} all-gather(%p), replica_groups=[1,4]<=[4]
}

%cond (p: (f32[64])) -> pred[] {
  ROOT %c = pred[] constant(true)
}

%below_5 (p: (s32[], f32[64])) -> pred[] {
  %five = s32[]{:T(128)} constant(5)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %five), direction=LT, metadata={op_name="while/cond/lt"}
}

%outer (p: (f32[64])) -> (f32[64]) {
  ROOT %w = (f32[64]) while(%p), body=%body, backend_config={"known_trip_count":{"n":"22"}}
}
"""


def test_a_collective_counts_once_per_iteration_of_every_loop_around_it():
    call = "  ROOT %w = (f32[64]) while(%x), condition=%cond, body=%outer{trips}"
    known = ', backend_config={"known_trip_count":{"n":"3"},"x":"1"}'
    found = count_collectives(program(call.format(trips=known), more=_LOOP), devices=4)
    assert found == ({"all-gather": 3 * 22 * 192}, 0)
    found = count_collectives(
        program(call.format(trips="").replace("%cond", "%below_5"), more=_LOOP), devices=4
    )
    assert found == ({"all-gather": 5 * 22 * 192}, 0)
    found = count_collectives(program(call.format(trips=""), more=_LOOP), devices=4)
    assert found == ({"all-gather": 22 * 192}, 1)


# A gather beside a matrix product, as the TPU compiler writes it.
_BESIDE = """\
%start (p: f32[16]) -> (f32[16], f32[64]) {
  %g.1 = f32[64]{0} all-gather(%p), replica_groups=[1,4]<=[4], frontend_attributes={chain_id="7"}
  ROOT %s = (f32[16], f32[64]) custom-call(%g.1), custom_call_target="AsyncCollectiveStart"
}

%during (p: f32[16], q: f32[64]) -> f32[64] {
  %g.2 = f32[64]{0} all-gather(%p), replica_groups=[1,4]<=[4], frontend_attributes={chain_id="7"}
}

%done (p: f32[16], q: f32[64]) -> f32[64] {
  %g.3 = f32[64]{0} all-gather(%p), replica_groups=[1,4]<=[4], frontend_attributes={chain_id="7"}
  ROOT %d = f32[64] custom-call(%p, %q, %g.3), custom_call_target="AsyncCollectiveDone"
}
"""


def test_a_collective_beside_other_work_counts_once():
    calls = "\n".join(
        f"  %{name}.9 = f32[64]{{0}} fusion(%x), kind=kCustom, calls=%{name}"
        for name in ("start", "during", "done")
    )
    found = count_collectives(program(calls, more=_BESIDE), devices=4)
    assert found.sent == {"all-gather": 192}
    assert found.total == 192
