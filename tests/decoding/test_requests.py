import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ivl_jax.buckets import bucket
from ivl_jax.decoding.requests import GenerationOptions, lay_out


@given(size=st.integers(1, 5000), smallest=st.sampled_from([1, 16, 64]))
def test_a_bucket_holds_its_size_and_wastes_at_most_a_third(size, smallest):
    found = bucket(size, smallest=smallest)
    assert found >= size
    assert found == smallest or (found - size) / found <= 1 / 3
    assert bucket(found, smallest=smallest) == found


def test_buckets_are_few_and_end_at_the_context():
    buckets = {bucket(size, smallest=16, largest=4000) for size in range(1, 4001)}
    assert len(buckets) == 17
    assert max(buckets) == 4000


def lay_out_three(**changes):
    arguments = {
        "sample_indices": [4, 5, 6],
        "context": 100,
        "stop_ids": (2, 7),
        "strengths": (1.0, -0.5),
        "row_multiple": 1,
    }
    options = [
        GenerationOptions(max_new_tokens=10, seed=3),
        GenerationOptions(max_new_tokens=95, temperature=0.5, stop_ids=(7, 9)),
        GenerationOptions(max_new_tokens=1, strengths=(0.0, 2.0)),
    ]
    return lay_out([[1] * 20, [5, 6], [8]], options, **{**arguments, **changes})


def test_requests_are_laid_out_row_by_row_and_filled_up():
    arrays = lay_out_three(row_multiple=4)
    assert arrays.prompts.shape == (4, 24)
    assert arrays.prompts[1].tolist() == [5, 6] + [0] * 22
    assert arrays.prompt_lengths.tolist() == [20, 2, 1, 1]
    # The second row would go beyond its context only at 101; the last row only fills the batch.
    assert arrays.limits.tolist() == [30, 97, 2, 0]
    assert arrays.capacity == 100
    assert arrays.stop_ids[0].tolist() == [2, 7] + [-1] * 6
    assert arrays.stop_ids[1].tolist() == [2, 7, 9] + [-1] * 5
    assert arrays.strengths.tolist() == [[1.0, -0.5], [1.0, -0.5], [0.0, 2.0], [1.0, -0.5]]
    assert arrays.sample_indices.tolist() == [4, 5, 6, 0]
    assert arrays.seeds.tolist() == [3, 0, 0, 0]
    np.testing.assert_array_equal(arrays.sampling.temperature, np.float32([0, 0.5, 0, 0]))


def test_rows_that_the_caller_has_already_are_not_made_more():
    # 8 rows over 3 devices are 9; the state on device has as many rows as the host thinks.
    prompts, options = [[1]] * 9, [GenerationOptions()] * 9
    arrays = lay_out(
        prompts,
        options,
        sample_indices=range(9),
        context=9,
        stop_ids=(),
        strengths=(),
        row_multiple=3,
        least_rows=9,
    )
    assert arrays.prompts.shape[0] == 9


def test_generation_never_passes_the_context():
    assert lay_out_three(context=25).limits.tolist() == [25, 25, 2]


def test_without_value_networks_strengths_have_no_columns():
    arrays = lay_out(
        [[1]],
        [GenerationOptions()],
        sample_indices=[0],
        context=9,
        stop_ids=(),
        strengths=(),
        row_multiple=1,
    )
    assert arrays.strengths.shape == (1, 0)
    assert arrays.capacity == 9
