"""Scores of dialogues whose gains are known, for the tests of the transfer report."""

import numpy as np

from ivl_jax.evaluation.transfer_report import FACTORS, Tokens, summarise

ROWS, EACH = 40, 6


def synthetic(*, gain=0.5, spread=0.3, best=1.0, seed=0):
    """Forty dialogues of six tokens; the mean NLL falls by `gain`, and is lowest at a factor."""
    rng = np.random.default_rng(seed)
    row = np.repeat(np.arange(ROWS), EACH)
    base_nll = rng.uniform(2, 4, len(row))
    gains = gain + spread * np.repeat(rng.normal(size=ROWS), EACH)
    base_right = rng.random(len(row)) < 0.25
    tokens = Tokens(
        row=row,
        position=np.tile(np.arange(EACH), ROWS),
        nll=base_nll - gains,
        base_nll=base_nll,
        entropy=rng.uniform(0, 6, len(row)),
        divergence=np.full(len(row), 0.25),
        right=base_right | (rng.random(len(row)) < 0.5),
        base_right=base_right,
    )
    shape = {factor: 1 - (factor - best) ** 2 for factor in (0.0, *FACTORS)}
    nlls = {
        factor: base_nll - gains * (value - shape[0.0]) / (shape[1.0] - shape[0.0])
        for factor, value in shape.items()
    }
    return tokens, nlls


def report_of(*, row_gains=None, others=None, **options):
    """The report of `synthetic` scores, or of dialogues with the given gains, by factor."""
    if row_gains is None:
        tokens, nlls = synthetic(**options)
        return summarise(tokens, nlls, names=[f"few.jsonl:{index}" for index in range(ROWS)])
    row = np.repeat(np.arange(len(row_gains)), EACH)
    base_nll = np.full(len(row), 4.0)
    by_factor = dict.fromkeys(FACTORS, row_gains - 9.0) | (others or {})
    nlls = {factor: base_nll - gains[row] for factor, gains in by_factor.items()}
    nlls |= {0.0: base_nll, 1.0: base_nll - row_gains[row]}
    tokens = Tokens(
        row=row,
        position=np.tile(np.arange(EACH), len(row_gains)),
        nll=nlls[1.0],
        base_nll=base_nll,
        entropy=np.ones(len(row)),
        divergence=np.ones(len(row)),
        right=np.ones(len(row), bool),
        base_right=np.zeros(len(row), bool),
    )
    names = [f"few.jsonl:{index}" for index in range(len(row_gains))]
    return summarise(tokens, dict(sorted(nlls.items())), names=names)
