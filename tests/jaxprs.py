"""What tests look for in a jaxpr."""

from collections.abc import Iterator

from jax.extend.core import Jaxpr, JaxprEqn, jaxprs_in_params


def equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """Every equation of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def products_in(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """Every dot_general of a jaxpr and of those inside it."""
    return (each for each in equations(jaxpr) if each.primitive.name == "dot_general")


def multiplied_dtypes(jaxpr: Jaxpr) -> list[str]:
    """The dtype of every factor of every product."""
    factors = [factor for product in products_in(jaxpr) for factor in product.invars]
    return [str(getattr(factor.aval, "dtype", None)) for factor in factors]
