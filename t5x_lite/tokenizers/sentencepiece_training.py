# SPDX-License-Identifier: Apache-2.0
"""Training of a small SentencePiece model."""

import io
from collections.abc import Iterable, Iterator

FORMAT = 1  # part of the cache key: raised when the options below change
MAX_CHARACTERS = (
    20_000_000  # characters: beyond that the pieces hardly change but training takes minutes
)


def sample_lines(texts: Iterable[str], most: int) -> Iterator[str]:
    """Lines of the texts up to `most` characters, each cut to the length that the trainer takes."""
    count = 0
    for text in texts:
        for line in text.splitlines():
            if line:
                yield line[:4000]
                count += len(line)
        if count > most:
            return


class LineSource:
    """Iterator over lines that keeps the error which ends it.

    Attributes:
      error: what the lines raised; None so far.
    """

    def __init__(self, lines: Iterator[str]):
        self.lines = lines
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            return next(self.lines)
        except StopIteration:
            raise
        except Exception as error:
            self.error = error
            raise


def train_sentencepiece(texts: Iterable[str], size: int) -> bytes:
    """Trains a model of `size` pieces that keeps every character of a text.

    Bytes stand in for characters without a piece, and spaces are kept.

    Raises:
      ValueError: the text is too small for so many pieces, or they are too few for bytes.
    """
    import sentencepiece

    model = io.BytesIO()
    lines = LineSource(sample_lines(texts, MAX_CHARACTERS))
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
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
    except Exception as error:  # the library wraps what the lines raise in a class of its own
        if lines.error is not None:
            raise lines.error from None
        if not isinstance(error, RuntimeError):
            raise
        raise ValueError(
            f"No SentencePiece of Vocabulary.size = {size} can be trained on this text: {error}"
        ) from error
    return model.getvalue()
