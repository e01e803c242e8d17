# SPDX-License-Identifier: Apache-2.0
"""A small SentencePiece model trained on the spot."""

import io
from collections.abc import Iterable, Iterator

FORMAT = 1  # part of the cache key: raised when the options below change
MOST = 20_000_000  # characters: beyond that the pieces hardly change but training takes minutes


def sample(texts: Iterable[str], most: int) -> Iterator[str]:
    """Lines of the texts up to `most` characters, each at most the length the trainer takes."""
    taken = 0
    for text in texts:
        for line in text.splitlines():
            if line:
                yield line[:4000]
                taken += len(line)
        if taken > most:
            return


def train(texts: Iterable[str], size: int) -> bytes:
    """A model of `size` pieces that gives every text back to the letter: bytes stand in for
    characters it has not seen, and blanks are kept.

    Raises ValueError if the text is too small for so many pieces, or they are too few for bytes.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sample(texts, MOST),
            model_writer=model,
            vocab_size=size,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            num_threads=2,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"No SentencePiece of Vocabulary.size = {size} can be trained on this text: {error}"
        ) from error
    return model.getvalue()
