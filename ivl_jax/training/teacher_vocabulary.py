"""Whether a teacher predicts the student's tokens.

In: the tokenizers of both. Out: nothing, or the reason why it cannot teach. Tuned models often have
special tokens that their base lacks, for padding or for turns (ChatML): the student has no output
for these, so the loss drops them from the teacher's distribution, which is then renormalised
(`ivl_jax.composed.token_scores.PositionLogits.teacher`).
"""

import logging

from ivl_jax.composed.sources import ModelSource
from ivl_jax.tokenizer_agreement import (
    known_ids,
    list_tokens,
    listed,
    ordinary_differences,
    warn_of_renamed,
)

logger = logging.getLogger(__name__)


def check_teacher_vocabulary(teacher: ModelSource, student: ModelSource) -> None:
    """Check that a teacher says how likely each of the student's tokens is.

    Args:
        teacher: the teacher, or its base.
        student: the model in whose vocabulary the student predicts.

    Raises:
        ValueError: an ordinary token differs or is the teacher's alone, or the teacher lacks tokens
            of the student.
    """
    ours, theirs = student.info, teacher.info
    only_teacher = sorted(known_ids(theirs) - known_ids(ours))
    differences = []
    if theirs.fingerprint != ours.fingerprint:
        differences = ordinary_differences(theirs, ours, roles=("teacher", "student"))
        differences += [
            f"id {token_id}: {token!r} in the teacher, absent in the student"
            for token_id in only_teacher
            if (token := theirs.ordinary_tokens[token_id]) is not None
        ]
    if differences:
        raise ValueError(
            f"the teacher has another vocabulary than the student {student.path}: "
            f"{len(differences)} ordinary tokens differ: {listed(differences)}. So its predictions "
            "are about other pieces of text, and no vocabulary map carries a whole distribution "
            "over: it pairs a token with one that may be only its beginning. Choose a teacher of "
            "the student's family; or let this one answer the prompts (infer.py --input … --output "
            "…) and train on its answers: docs/distillation.md"
        )
    only_student = sorted(known_ids(ours) - known_ids(theirs))
    if only_student:
        raise ValueError(
            f"the teacher {teacher.path} lacks {len(only_student)} tokens of the student "
            f"{student.path}, so it cannot teach how likely they are: "
            f"{list_tokens(ours, only_student)}; choose a teacher with all of the student's tokens"
        )
    warn_of_renamed(theirs, ours, names=(f"the teacher {teacher.path}", student.path))
    dropped = [token_id for token_id in only_teacher if token_id >= ours.vocab_size]
    if dropped:
        logger.warning(
            "the teacher %s has %d tokens that the student %s lacks; they are dropped from its "
            "predictions, which are renormalised: %s",
            teacher.path,
            len(dropped),
            student.path,
            list_tokens(theirs, dropped),
        )
