# SPDX-License-Identifier: Apache-2.0
"""Laws of the lm-evaluation-harness: its numbers of our models are those of its own backend.

Both read the same folder of transformers, in float32 on the CPU, with tasks of local files.
"""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lm_eval")
import lm_eval.api.registry  # noqa: E402
import lm_eval.models.huggingface  # noqa: E402
import lm_eval.tasks  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from conftest import mark_exhaustive  # noqa: E402
from parity import shaken  # noqa: E402

from t5x_lite import config  # noqa: E402
from t5x_lite import eval as evaluation  # noqa: E402
from t5x_lite.evaluation import lm_harness  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def offline():
    """Keeps the harness and the libraries that it loads from asking the hub."""
    import datasets
    from huggingface_hub import constants

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        for module in (constants, datasets.config):
            patch.setattr(module, "HF_HUB_OFFLINE", True)
        yield


WORDS = [f"w{i}" for i in range(24)]
EMPTY = 3  # number of the row whose context is empty
YAML = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{label}}"
doc_to_choice: "{{choices}}"
metric_list:
  - metric: acc
  - metric: acc_norm
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
""",
    "writing": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: [" w1", " w5"], max_gen_toks: 6, do_sample: false}
metric_list:
  - metric: exact_match
""",
}


def write_tokenizer(folder: Path, before: str, after: str, bos: str = "") -> None:
    """Writes a tokenizer of words.

    Args:
      folder: the folder.
      before: token that begins a text; empty for none.
      after: token that ends a text; empty for none.
      bos: name of bos where it begins no text.
    """
    import tokenizers

    # Of the tokens of one tokenizer it is known what each writes, so that rows end at stop texts.
    spaced = "▁" if before else ""
    names = ["<pad>", "</s>", "<s>", "<unk>", *(spaced + word for word in WORDS)]
    words = tokenizers.models.WordLevel({name: k for k, name in enumerate(names)}, "<unk>")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    if spaced:
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
        tokenizer.decoder = tokenizers.decoders.Metaspace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=" ".join(filter(None, [before, "$A", after])),
        special_tokens=[(name, names.index(name)) for name in ("<s>", "</s>")],
    )
    roles = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    roles |= {"bos_token": bos or before} if bos or before else {}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)
    fast.save_pretrained(folder)


def write_llama(folder: Path) -> None:
    described = transformers.LlamaConfig(
        vocab_size=28,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=24,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
    )
    theirs = transformers.LlamaForCausalLM(described)
    shaken(theirs, 1, scale=0.3).save_pretrained(folder)
    write_tokenizer(folder, "<s>", "")


def write_t5(folder: Path) -> None:
    described = transformers.T5Config(
        vocab_size=28,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_heads=2,
        num_layers=2,
        num_decoder_layers=2,
        feed_forward_proj="gated-gelu",
        n_positions=24,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(2)
    theirs = transformers.T5ForConditionalGeneration(described)
    shaken(theirs, 2, scale=0.25).save_pretrained(folder)
    write_tokenizer(folder, "", "</s>")


def write_gpt2(folder: Path) -> None:
    """Writes a model whose texts begin with no token, and that has learned positions."""
    sizes = dict(vocab_size=28, n_embd=16, n_head=2, n_layer=2, n_positions=24)
    described = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=1)
    shaken(transformers.GPT2LMHeadModel(described), 3, scale=0.3).save_pretrained(folder)
    write_tokenizer(folder, "", "", bos="</s>")


def write_bart(folder: Path) -> None:
    """Writes a model whose inputs begin and end with a token."""
    sizes = dict(vocab_size=28, d_model=16, max_position_embeddings=64)
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 2, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 24}
    ids = dict(bos_token_id=2, eos_token_id=1, pad_token_id=0, decoder_start_token_id=1)
    described = transformers.BartConfig(**sizes, **ids, forced_eos_token_id=None)
    theirs = transformers.BartForConditionalGeneration(described)
    shaken(theirs, 4, scale=0.3).save_pretrained(folder)
    write_tokenizer(folder, "<s>", "</s>")


WRITERS = {"bart": write_bart, "gpt2": write_gpt2, "llama": write_llama, "t5": write_t5}


def text(draw: np.random.Generator, least: int, most: int) -> str:
    return " ".join(draw.choice(WORDS, int(draw.integers(least, most))))


def write_tasks(folder: Path) -> list[str]:
    """Tasks of local files, of contexts that are short, empty and longer than the models read."""
    draw = np.random.default_rng(0)
    rows = []
    for number in range(24):
        row = {"question": text(draw, 1, 9), "text": text(draw, 1, 20), "label": number % 3}
        row |= {"choices": [" " + text(draw, 1, 4) for _ in range(3)]}
        row |= {"answer": ("w11", "w1", "w12")[number % 3]}
        rows.append(row)
    rows[EMPTY]["question"], rows[5]["question"] = "", text(draw, 30, 31)
    rows[7]["text"] = text(draw, 60, 61)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    where = {"test": str(folder / "rows.jsonl")}
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": where, "cache_dir": str(folder / "cache")},
        "test_split": "test",
    }
    paths = []
    for name, body in YAML.items():
        path = folder / f"{name}.yaml"
        lines = [f"{key}: {json.dumps(value)}" for key, value in shared.items()]
        path.write_text("\n".join([f"task: {name}", *lines]) + body)
        paths.append(str(path))
    return paths


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> list[str]:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


# One of each layout; BART and GPT-2 differ in positions and tokens alone.
@pytest.fixture(scope="module", params=mark_exhaustive(sorted(WRITERS), kept=["llama", "t5"]))
def folder(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    WRITERS[request.param](path)
    return path


def printed(results: dict) -> dict[str, dict[str, str]]:
    """Numbers of each task as the harness prints them."""
    return {
        task: {
            name: f"{value:.4f}"
            for name, value in numbers.items()
            if isinstance(value, float) and "stderr" not in name
        }
        for task, numbers in results["results"].items()
    }


def answers(results: dict, task: str) -> list:
    """Answers of a model to the requests of a task, by document."""
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"] for sample in samples]


@pytest.mark.slow
def test_numbers_equal_those_of_the_backend_of_transformers(folder, tasks):
    ours = lm_harness.load_harness_model(folder, batch_size=7)
    manager = lm_eval.tasks.TaskManager(include_defaults=False)
    options = dict(tasks=tasks, bootstrap_iters=0, task_manager=manager)
    backend = "seq2seq" if ours.predictor.cfg.encoder else "causal"
    arguments = dict(pretrained=str(folder), dtype="float32", device="cpu", backend=backend)
    # Theirs pads on the left, which moves the positions of BART.
    rows = 1 if folder.name.startswith("bart") else 5
    theirs = lm_eval.models.huggingface.HFLM(**arguments, batch_size=rows)
    assert (ours.max_length, ours.prefix_token_id) == (theirs.max_length, theirs.prefix_token_id)
    actual, expected = (lm_eval.simple_evaluate(model=each, **options) for each in (ours, theirs))
    assert printed(actual) == printed(expected)
    assert {name.partition(",")[0] for name in printed(actual)["choice"]} == {"acc", "acc_norm"}
    if folder.name.startswith(("llama", "t5")):
        assert 0 < float(printed(actual)["writing"]["exact_match,none"]) < 1
    written = zip(answers(actual, "writing"), answers(expected, "writing"), strict=True)
    for number, ((one,), (other,)) in enumerate(written):
        # Theirs grants a decoder as many tokens more as the longest context of its batch has, and
        # reads an empty context without bos as padding alone.
        longer = backend == "seq2seq" and len(one.split()) == 6
        empty = number == EMPTY and folder.name.startswith("gpt2")
        assert one == other or (longer and other.startswith(one)) or empty
    for task in ("choice", "rolling"):
        pairs = zip(answers(actual, task), answers(expected, task), strict=True)
        for one, other in pairs:
            np.testing.assert_allclose(
                np.array(one, np.float64), np.array(other, np.float64), atol=2e-5
            )


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("alone")
    write_llama(path)
    return path


@pytest.mark.slow
def test_the_command_measures_a_local_task(llama, tasks, tmp_path, capsys):
    path = tmp_path / "numbers.json"
    words = [f"--checkpoint={llama}", f"--lm_eval={tasks[0]},{tasks[1]}", "--examples=6"]
    assert evaluation.main([*words, f"--json={path}"]) in (0, None)
    numbers = json.loads(path.read_text())
    assert numbers["n-samples"]["choice"]["effective"] == 6 and "rolling" in numbers["results"]
    shown = capsys.readouterr().out
    assert "acc_norm" in shown and f"{numbers['results']['choice']['acc,none']:.4f}" in shown


def test_arguments_of_the_harness_are_read(llama):
    make = lm_harness.NamedHarnessModel.create_from_arg_obj
    shared = {"batch_size": "5", "max_batch_size": None, "device": "cpu"}
    assert make({"checkpoint": str(llama), "max_length": 9}, shared).max_length == 9
    assert make({"checkpoint": str(llama)}, shared).predictor.batch_size == 5
    automatic = make({"checkpoint": str(llama)}, {"batch_size": "auto"}).predictor
    assert automatic.batch_size == config.Evaluate().batch_size
    text = f"checkpoint={llama},max_length=7"
    named = lm_eval.api.registry.get_model("t5x_lite")
    assert named.create_from_arg_string(text, shared).max_length == 7
    with pytest.raises(ValueError, match="batch_size must be"):
        make({"checkpoint": str(llama), "batch_size": 0}, shared)


def test_mistakes_are_answered(llama):
    with pytest.raises(ValueError, match="model_args has steps: it takes checkpoint=PATH"):
        lm_harness.load_harness_model(llama, steps=3)
    with pytest.raises(ValueError, match="names no checkpoint"):
        lm_harness.NamedHarnessModel.create_from_arg_obj({}, {"device": None})
    with pytest.raises(ValueError, match="--lm_eval: there is no task no_such.yaml"):
        lm_harness.measure_tasks(None, ["no_such.yaml"])
    for words, message in (
        (["--few_shot=2"], "--few_shot is about tasks of the lm-evaluation-harness"),
        (["--lm_eval=a.yaml", "--split=test"], "--lm_eval measures tasks of their own .* --split"),
        (["--normalize=tokens"], "--normalize is about the choices of --superglue"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluation.check_options(evaluation.parser().parse([f"--checkpoint={llama}", *words]))
