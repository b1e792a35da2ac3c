"""Evaluations of a base with value networks, one per file.

An evaluation is a module of this package that defines, at its top level,

- `Flags`, a frozen dataclass: the flags of its command, each field with a default and a docstring
  (the help text). The first line of its docstring is its line in `--help`. A field
  `model: Inline[ModelFlags]` gives it the flags that choose the models.
- `run(flags: Flags)`: runs it. Inconsistent flags and invalid input raise a `ConfigError`, before
  any weight is read if possible.

`python -m ivl_jax.evaluation NAME` finds it by itself; the name is the module's, with `-` for `_`.
Your own evaluation needs no change here: `python -m ivl_jax.evaluation my_package.my_module …`.

Keep the module fast to import: import whatever needs JAX inside `run`, so that `--help` stays fast.
"""
