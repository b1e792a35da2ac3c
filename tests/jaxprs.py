"""What tests look for in a jaxpr."""

from collections.abc import Iterator

from jax.extend.core import Jaxpr, JaxprEqn, jaxprs_in_params


def products_in(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """Every dot_general of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from products_in(inner)


def multiplied_dtypes(jaxpr: Jaxpr) -> list[str]:
    """The dtype of every factor of every product."""
    factors = [factor for product in products_in(jaxpr) for factor in product.invars]
    return [str(getattr(factor.aval, "dtype", None)) for factor in factors]
