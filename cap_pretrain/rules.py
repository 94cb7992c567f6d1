"""Rules on parameter paths, which control sharding, weight decay, learning rates and freezing.

A rule is a pair (regular expression, value). The expression must match the whole path of a
parameter in the learner, such as `encoder/blocks/attention/query/kernel`; the first rule that
matches wins. A rule that matches no parameter is an error, most likely a typo.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from cap_pretrain.errors import UserError


def path_string(key_path: Sequence[Any]) -> str:
    """Join a JAX key path: `(DictKey('encoder'), DictKey('kernel'))` -> "encoder/kernel"."""
    return jax.tree_util.keystr(tuple(key_path), simple=True, separator="/")


def flatten(tree: Any) -> dict[str, Any]:
    """Return the leaves of `tree` by path, such as "encoder/kernel"."""
    return {path_string(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def apply_rules(
    rules: Iterable[tuple[str, Any]], tree: Any, *, default: Any, field: str, strict: bool = True
) -> Any:
    """Return a tree like `tree` with the value of the first matching rule, or `default`, at leaves.

    `default` must not be None, which would be an empty pytree; `field` is for error messages.
    Raises UserError if a rule is not a pair with a valid expression or, if `strict`, matches no
    path.
    """
    compiled = []
    for rule in rules:
        try:
            pattern, value = rule
            if not isinstance(pattern, str):
                raise TypeError
        except (TypeError, ValueError) as e:
            raise UserError(f"{field}: {rule!r} is not a pair (pattern, value).") from e
        try:
            compiled.append((re.compile(pattern), value))
        except re.error as e:
            raise UserError(f"{field}: {pattern!r} is not a regular expression ({e}).") from e
    paths = list(flatten(tree))
    for regex, _ in compiled if strict else ():
        if not any(regex.fullmatch(path) for path in paths):
            raise UserError(
                f"{field}: {regex.pattern!r} matches no parameter. "
                f"Paths look like {paths[0]!r}; the whole path must match."
            )

    def value_of(key_path, _):
        path = path_string(key_path)
        return next((v for regex, v in compiled if regex.fullmatch(path)), default)

    return jax.tree_util.tree_map_with_path(value_of, tree)
