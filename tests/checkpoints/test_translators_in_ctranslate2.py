# SPDX-License-Identifier: Apache-2.0
"""Exports of BART, Marian, M2M100, NLLB, mBART-50 and Pegasus: CTranslate2 writes what we write."""

import json

import ctranslate2
import pytest
from conftest import mark_exhaustive
from translation_toys import LINES, write_translator

from t5x_lite import convert, interactive

# Source, target and the token of the target, which CTranslate2 takes as a prefix.
LANGUAGES = {
    "m2m100": ("de", "ro", "__ro__"),
    "nllb": ("eng_Latn", "deu_Latn", "deu_Latn"),
    "mbart50": ("en_XX", "de_DE", "de_DE"),
}
LENGTH = 12


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    # Pegasus has BART's blocks and Marian's positions; the languages differ in their tokens.
    mark_exhaustive(["bart", "marian", "pegasus", *LANGUAGES], kept=["bart", "marian", "m2m100"]),
)
def test_ctranslate2_writes_the_same_from_an_export(name, tmp_path):
    (tmp_path / "theirs").mkdir()
    write_translator(name, tmp_path / "theirs")
    run, folder, converted = (tmp_path / each for each in ("run", "hf", "ct2"))
    convert.main([f"--from={tmp_path / 'theirs'}", f"--to={run}"])
    convert.main([f"--from={run}", f"--to={folder}", "--format=huggingface"])
    ctranslate2.converters.TransformersConverter(str(folder)).convert(str(converted))
    session = interactive.load(run)
    source, target, token = LANGUAGES.get(name, (None, None, None))
    if target:
        session.set_languages(source, target)
    lines, pieces = LINES[:12], json.loads((converted / "shared_vocabulary.json").read_text())
    read = [[pieces[token] for token in ids] for ids in session.predictor.encode_inputs(lines)]
    translator = ctranslate2.Translator(
        str(converted), compute_type="float32", intra_threads=1, inter_threads=1
    )
    for beams in (1, 3):
        written = translator.translate_batch(
            read,
            target_prefix=[[token]] * len(read) if token else None,
            beam_size=beams,
            max_decoding_length=LENGTH,
            length_penalty=1.0,
        )
        ours = session.predict(
            lines, beams=beams, length_penalty=1.0 if beams > 1 else None, max_new_tokens=LENGTH
        )
        stops = session.predictor.targets.stops
        texts = [[t for t in map(int, each.tokens[0]) if t not in stops] for each in ours]
        assert len({tuple(text) for text in texts}) > 2
        expected = [[pieces.index(piece) for piece in each.hypotheses[0]] for each in written]
        assert texts == expected, beams
