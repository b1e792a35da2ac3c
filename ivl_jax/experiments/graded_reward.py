"""A graded reward for answers of one sentence that earns nothing by leaving a word out.

In: a `Sample`. Out: a number in [0, 1], as `grpo.rewards` takes it.
"""

from ivl_jax.rewards import Sample


def words_in_place(sample: Sample) -> float:
    """Share of the words that are right at their place, of the longer of answer and reference.

    F1 counts a missing word once and a wrong one twice, in the answer and in the reference: trained
    on it for long, answers come to leave out the word that may be wrong. Here both count once.

    >>> reference, prompt = "Ann lives in Paris.", "Where does Ann live?"
    >>> [words_in_place(Sample(answer, reference, prompt, "")) for answer in (
    ...     "Ann lives in Paris.", "Ann lives in Rome.", "Ann lives in", "in Paris.", "")]
    [1.0, 0.75, 0.75, 0.0, 0.0]
    """
    answer, reference = sample.answer.split(), sample.reference.split()
    right = sum(one == other for one, other in zip(answer, reference, strict=False))
    return right / max(len(answer), len(reference), 1)
