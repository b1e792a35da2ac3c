"""Evaluations: what a base with value networks on top is worth, one evaluation per file.

An evaluation is a module of this package that defines, at its top level,

- `Flags`, a frozen dataclass: the flags of its command, each field with a default and a docstring
  (the help text). The first line of its docstring is its line in `--help`. A field
  `model: Inline[ModelFlags]` gives it the flags that choose the models.
- `run(flags: Flags)`: runs it. Flags that do not belong together, and input that cannot be used,
  raise a `ConfigError`, before any weight is read where that can be known.

`python -m ivl_jax.evaluation NAME` finds it by itself; the name is the module's, with `-` for `_`.
One of your own needs no change here: `python -m ivl_jax.evaluation my_package.my_module …`.

Keep the module quick to import: what needs JAX is imported inside `run`, so that `--help` of all
evaluations takes no longer than their flags do.
"""
