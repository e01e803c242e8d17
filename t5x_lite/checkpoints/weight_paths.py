# SPDX-License-Identifier: Apache-2.0
"""Paths of weights: trees of arrays as flat dicts by dotted names, and back."""

from collections.abc import Callable, Mapping
from typing import Any

import jax


def flatten_tree(
    tree: Any, separator: str = ".", is_leaf: Callable[[Any], bool] | None = None
) -> dict[str, Any]:
    """Leaves of a tree by their paths, in the order of jax.tree.leaves.

    Args:
      tree: any pytree, such as params or a TrainState.
      separator: between the keys of a path: "encoder.layers.attention.query" in files of
        checkpoints, "/" in tables of conversions.
      is_leaf: marks nodes that are not to be descended into, as jax.tree.leaves has it.

    Returns:
      A leaf for each path.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf)
    return {
        jax.tree_util.keystr(path, simple=True, separator=separator): leaf for path, leaf in leaves
    }


def nest_tree(flat: Mapping[str, Any], separator: str = ".") -> dict[str, Any]:
    """The nested dict of which `flat` holds the leaves by path."""
    nested: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split(separator)
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return nested
