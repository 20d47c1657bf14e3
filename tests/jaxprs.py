"""What is in a traced program: the shapes of all its arrays, and its matrix products."""

from jax.extend.core import ClosedJaxpr, Jaxpr


def equations(program):
  """All equations of a program, those of the loops and functions in it too."""
  for equation in getattr(program, "jaxpr", program).eqns:
    yield equation
    for name, value in equation.params.items():
      for inner in value if isinstance(value, list | tuple) else (value,):
        if isinstance(inner, ClosedJaxpr | Jaxpr) and name not in ("fwd_jaxpr_thunk", "bwd"):
          yield from equations(inner)


def arrays_of(program):
  """The shapes of all that a program computes."""
  return {variable.aval.shape for equation in equations(program) for variable in equation.outvars}


def products_of(program):
  """The shapes of the operands of a program's matrix products."""
  found = (equation for equation in equations(program) if equation.primitive.name == "dot_general")
  return [tuple(variable.aval.shape for variable in equation.invars) for equation in found]
