"""The compositions that the study of a real model compares.

Out: `SUBJECTS`, a table; its order is that of the report.
"""

from typing import Literal, NamedTuple

from ivl_jax.experiments.real.items import KINDS
from ivl_jax.experiments.real.settings import Stage

Subject = Literal[
    "sibling",
    "donor",
    "donor_value",
    "donor_tuned",
    "target",
    "target_value",
    "target_family_value",
    "target_proxy",
    "target_lora",
    "target_full",
]


class Parts(NamedTuple):
    """What a subject is composed of."""

    name: str
    """In the report."""
    base: Stage | None
    """The stage that makes the base; None: the target."""
    added: tuple[Stage, ...] = ()
    """The stages that make what is added to it."""
    strengths: tuple[float, ...] = ()
    kinds: tuple[str, ...] = KINDS
    """Of the questions that it is measured on."""

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages that make it, but for the target."""
        return self.added if self.base is None else (self.base, *self.added)


SUBJECTS: dict[Subject, Parts] = {
    "sibling": Parts("first and last layers, before healing", "sibling"),
    "donor": Parts("donor", "healing"),
    "donor_value": Parts("donor + value", "healing", ("value",)),
    "donor_tuned": Parts("donor fully fine-tuned", "donor_tuned"),
    "target": Parts("target", None),
    "target_value": Parts("target + value", None, ("value",)),
    # Its context of 256 tokens does not hold a worked answer of GSM8K.
    "target_family_value": Parts(
        "target + value of S, through a map", None, ("family_value",), kinds=("docstring",)
    ),
    "target_proxy": Parts(
        "target + (donor fine-tuned − donor)", None, ("donor_tuned", "healing"), (1.0, -1.0)
    ),
    "target_lora": Parts("target fine-tuned by LoRA", "target_lora"),
    "target_full": Parts("target fully fine-tuned", "target_full"),
}
