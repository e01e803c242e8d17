# SPDX-License-Identifier: Apache-2.0
"""The interface of vocabularies."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class TextVocabulary(Protocol):
    """Conversion of texts to ids and back.

    Attributes:
      sentinels: number of sentinels.
      sentinel_ids: id of the k-th sentinel at k, int32 [sentinels].
      eos: id that ends a sequence.
      pad: id of padding.
      bos: id that begins an encoder's inputs; None for none.
      ends: sequences finish with eos.
    """

    @property
    def sentinels(self) -> int: ...

    @property
    def sentinel_ids(self) -> np.ndarray: ...

    @property
    def eos(self) -> int: ...

    @property
    def pad(self) -> int: ...

    @property
    def bos(self) -> int | None: ...

    @property
    def ends(self) -> bool: ...

    @property
    def size(self) -> int:
        """Number of ids."""

    @property
    def stops(self) -> tuple[int, ...]:
        """Ids of which any ends what a model writes; eos alone as a rule."""

    def __hash__(self) -> int: ...

    def token(self, name: str) -> int | None:
        """The id of a piece; None if it is unknown."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without those that begin and end a sequence."""

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of several texts, int32 [ids] each."""

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids up to the first of `stops`."""

    def description(self) -> dict:
        """JSON-ready values that create this vocabulary again, with `model_bytes`."""

    def model_bytes(self) -> bytes | None:
        """Content of the trained model's file; None without one."""
