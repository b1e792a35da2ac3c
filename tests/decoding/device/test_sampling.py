import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ivl_jax.decoding.device import sampling as sampling_module
from ivl_jax.decoding.device.sampling import Sampling, likeliest, row_keys
from tests.decoding.tiny import bias_of

filter_logits = jax.jit(sampling_module.filter_logits)
sample_tokens = jax.jit(sampling_module.sample_tokens)


def make_sampling(rows, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    def column(value, dtype):
        return jnp.asarray(np.broadcast_to(np.asarray(value, dtype), (rows,)))

    return Sampling(
        temperature=column(temperature, np.float32),
        top_k=column(top_k, np.int32),
        top_p=column(top_p, np.float32),
        min_p=column(min_p, np.float32),
    )


def make_keys(rows, seed=0):
    return row_keys(jnp.full(rows, seed, jnp.int32), jnp.arange(rows, dtype=jnp.int32))


def random_logits(rows, width, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(rows, width)) * 3, jnp.float32)


def zeros(rows):
    return jnp.zeros(rows, jnp.int32)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 1.7, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
        {"temperature": 0.3, "top_k": 3, "top_p": 0.5, "min_p": 0.3},
        {"top_k": 10_000},
    ],
    ids=str,
)
def test_filters_equal_those_of_transformers(options):
    torch = pytest.importorskip("torch", reason="the extra `torch` is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.generation import logits_process

    logits = random_logits(4, 97)
    expected = torch.from_numpy(np.array(logits))
    chain = [
        ("temperature", logits_process.TemperatureLogitsWarper),
        ("top_k", logits_process.TopKLogitsWarper),
        ("top_p", logits_process.TopPLogitsWarper),
        ("min_p", logits_process.MinPLogitsWarper),
    ]
    for name, warper in chain:
        if name in options:
            expected = warper(options[name])(None, expected)
    ours = filter_logits(logits, make_sampling(4, **options))
    assert np.array_equal(np.isneginf(ours), torch.isneginf(expected).numpy())
    kept = ~np.isneginf(np.asarray(ours))
    shifted = (expected - expected.max(dim=-1, keepdim=True).values).numpy()
    np.testing.assert_allclose(np.asarray(ours)[kept], shifted[kept], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("top_p", [1e-300, 1e-45, 1e-38, 1e-9])
def test_the_smallest_top_p_keeps_the_likeliest_token_alone(top_p):
    """Float32 rounds the first three to 0, which must not keep everything."""
    logits = random_logits(3, 50)
    kept = np.isfinite(filter_logits(logits, make_sampling(3, top_p=top_p)))
    np.testing.assert_array_equal(kept.sum(axis=-1), 1)
    np.testing.assert_array_equal(kept.argmax(axis=-1), likeliest(logits))


def test_each_row_is_filtered_by_its_own_settings():
    logits = jnp.tile(random_logits(1, 50), (5, 1))
    mixed = make_sampling(
        5,
        temperature=[1.0, 0.5, 1.0, 2.0, 0.0],
        top_k=[0, 7, 0, 3, 0],
        top_p=[1.0, 1.0, 0.6, 0.9, 1.0],
        min_p=[0.0, 0.0, 0.0, 0.0, 0.2],
    )
    together = filter_logits(logits, mixed)
    for row in range(5):
        alone = filter_logits(
            logits[row : row + 1], jax.tree.map(lambda x, r=row: x[r : r + 1], mixed)
        )
        np.testing.assert_array_equal(together[row], alone[0])
    assert len({int(np.isfinite(row).sum()) for row in np.asarray(together)}) >= 4


def test_settings_that_are_off_keep_every_token():
    logits = random_logits(3, 1000)
    assert np.isfinite(filter_logits(logits, make_sampling(3))).all()


def test_a_vanishing_temperature_is_greedy_and_never_nan():
    logits = 30 * random_logits(3, 100)  # divided by 2e-38 they would be infinite
    tokens = sample_tokens(logits, make_sampling(3, temperature=2e-38), make_keys(3), zeros(3))
    assert tokens.tolist() == jnp.argmax(logits, axis=-1).tolist()


def test_top_p_of_one_next_to_top_k_keeps_every_token_of_the_other_row():
    # A row with an order filter makes the sorted path run for all rows.
    # The running sum rounds to 1 long before the last token.
    logits = jnp.tile(jnp.linspace(0.0, -50.0, 4096, dtype=jnp.float32), (2, 1))
    kept = filter_logits(logits, make_sampling(2, top_k=[1, 0], top_p=[0.5, 1.0]))
    assert int(jnp.isfinite(kept[1]).sum()) == 4096


def test_tokens_that_tie_with_the_last_kept_one_are_kept():
    logits = jnp.asarray([[3.0, 2.0, 2.0, 2.0, 1.0]])
    assert np.isfinite(filter_logits(logits, make_sampling(1, top_k=2))).tolist() == [
        [True, True, True, True, False]
    ]


@given(
    temperature=st.floats(0.05, 5.0),
    top_k=st.integers(0, 40),
    top_p=st.floats(0.01, 1.0),
    min_p=st.floats(0.0, 0.99),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_the_likeliest_token_always_survives(temperature, top_k, top_p, min_p, seed):
    logits = random_logits(2, 32, seed)
    sampling = make_sampling(2, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    filtered = np.asarray(filter_logits(logits, sampling))
    best = np.argmax(logits, axis=-1)
    assert np.isfinite(filtered[np.arange(2), best]).all()
    tokens = sample_tokens(logits, sampling, make_keys(2, seed), zeros(2))
    assert np.isfinite(filtered[np.arange(2), tokens]).all()


def test_temperature_zero_is_arg_max_and_the_lowest_id_wins_a_tie():
    logits = jnp.asarray([[0.0, 5.0, 5.0, 1.0], [9.0, 5.0, 5.0, 1.0]])
    tokens = sample_tokens(logits, make_sampling(2, temperature=0.0), make_keys(2), zeros(2))
    assert tokens.tolist() == [1, 0]


def test_greedy_rows_next_to_sampled_rows_stay_greedy():
    logits = jnp.tile(random_logits(1, 64), (64, 1))
    temperature = np.where(np.arange(64) % 2 == 0, 0.0, 5.0)
    tokens = sample_tokens(
        logits, make_sampling(64, temperature=temperature), make_keys(64), zeros(64)
    )
    greedy = int(jnp.argmax(logits[0]))
    assert (np.asarray(tokens)[::2] == greedy).all()
    assert len(set(np.asarray(tokens)[1::2].tolist())) > 5


def test_a_rows_sample_depends_on_neither_batch_mates_nor_vocabulary_padding():
    logits = random_logits(6, 40)
    sampling = make_sampling(6, temperature=2.0, top_k=[0, 9, 0, 9, 0, 9], min_p=0.01)
    keys = make_keys(6, seed=3)
    indices = jnp.asarray([0, 4, 2, 9, 9, 1], jnp.int32)
    together = sample_tokens(logits, sampling, keys, indices)
    padded = jnp.pad(logits, ((0, 0), (0, 24)), constant_values=-jnp.inf)
    for row in range(6):
        one = jax.tree.map(lambda x, r=row: x[r : r + 1], (sampling, keys, indices))
        assert sample_tokens(padded[row : row + 1], *one)[0] == together[row]


def test_keys_differ_by_seed_by_row_and_by_token_index():
    logits = jnp.zeros((200, 1000), jnp.float32)
    sampling = make_sampling(200)
    draws = {
        "rows": sample_tokens(logits, sampling, make_keys(200), zeros(200)),
        "seed": sample_tokens(logits, sampling, make_keys(200, seed=1), zeros(200)),
        "index": sample_tokens(logits, sampling, make_keys(200), zeros(200) + 1),
    }
    assert len(set(np.asarray(draws["rows"]).tolist())) > 150
    for name in ("seed", "index"):
        assert (np.asarray(draws[name]) == np.asarray(draws["rows"])).mean() < 0.05, name


def test_samples_follow_the_filtered_distribution():
    rows = 20_000
    logits = jnp.tile(jnp.asarray([[2.0, 1.0, 0.0, -1.0, -2.0]]), (rows, 1))
    sampling = make_sampling(rows, temperature=1.5, top_k=4)
    tokens = sample_tokens(logits, sampling, make_keys(rows), zeros(rows))
    counts = np.bincount(np.asarray(tokens), minlength=5)
    expected = np.asarray(
        jax.nn.softmax(filter_logits(logits[:1], make_sampling(1, temperature=1.5, top_k=4))[0])
    )
    assert counts[4] == 0
    chi_square = ((counts[:4] - rows * expected[:4]) ** 2 / (rows * expected[:4])).sum()
    assert chi_square < 16.27  # 3 degrees of freedom, p = 0.001


@pytest.mark.parametrize("temperature", [0.0, 1.3], ids=["greedy", "sampled"])
def test_a_bias_bans_and_forces_tokens_and_leaves_the_other_rows_as_they_were(temperature):
    logits, keys = random_logits(64, 29), make_keys(64)
    sampling = make_sampling(64, temperature=temperature, top_k=7)
    plain = np.asarray(sample_tokens(logits, sampling, keys, zeros(64)))
    # Of the even rows, each second one forces a token, and the others ban what they had.
    even = [{5: 100} if row % 4 else {int(plain[row]): -100} for row in range(0, 64, 2)]
    bias = bias_of(*[{} if row % 2 else even[row // 2] for row in range(64)])
    found = np.asarray(sample_tokens(logits, sampling._replace(bias=bias), keys, zeros(64)))
    np.testing.assert_array_equal(found[1::2], plain[1::2])
    assert (found[2::4] == 5).all()
    assert (found[::4] != plain[::4]).all()


def test_rows_without_a_bias_keep_their_logits_bit_for_bit_and_compute_nothing_for_it():
    logits = random_logits(3, 29).at[:, 25:].set(-jnp.inf)
    biased = sampling_module.add_bias(
        logits, make_sampling(3)._replace(bias=bias_of({3: 1.5, 7: -2.0}, {}, {0: 4.0}))
    )
    expected = np.asarray(logits).copy()
    expected[0, [3, 7]] += [1.5, -2.0]
    expected[2, 0] += 4.0
    np.testing.assert_array_equal(biased, expected)
    assert sampling_module.add_bias(logits, make_sampling(3)) is logits


def test_a_row_without_a_largest_logit_gives_a_real_token():
    logits = jnp.stack([jnp.full(7, jnp.nan), jnp.full(7, -jnp.inf), jnp.arange(7.0)])
    np.testing.assert_array_equal(likeliest(logits), [0, 0, 6])
