# SPDX-License-Identifier: Apache-2.0
"""Laws of exports: a model card says what they are, and what is uploaded is what is loaded."""

import ast
import dataclasses
import json
import re
from pathlib import Path

import huggingface_hub
import pytest
from conversion_toys import T5, Drawn, write_ours
from hub_server import HubServer
from hub_toys import list_cached, write_folders

from t5x_lite import adapt, config, convert, interactive
from t5x_lite.checkpoints import model_card
from t5x_lite.checkpoints.opening import open_checkpoint
from t5x_lite.config import gin_file

# Of huggingface_hub's own requests, where xet, its other way to upload, is switched off.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
WORDS = ["abba", "cab", "d"]
NAME = "tester/toy"
REPORT = {"steps": 300, "split": "test", "exact_match": 0.25, "wer": 0.5, "compile_seconds": 9.0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    return write_folders(tmp_path_factory.mktemp("folders"))


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A hub that this process is logged in to."""
    monkeypatch.chdir(tmp_path)
    with HubServer() as server:
        server.use_here(monkeypatch, tmp_path / "cache", server.token)
        yield server


def push(source: Path | str, *more: str) -> None:
    convert.main([f"--from={source}", f"--to={NAME}", "--push", *more])


@pytest.mark.parametrize("format", ["ours", "huggingface"])
def test_what_is_pushed_is_loaded_by_its_name(served, folders, tmp_path, format, capsys):
    push(folders / "ours", f"--format={format}")
    assert f"{format}: {served.url}/{NAME}" in capsys.readouterr().err
    files = served.files(NAME)
    assert {"README.md", ".gitattributes"} < files.keys()
    assert list(tmp_path.iterdir()) == []  # no folder tester/, no leftovers
    expected = interactive.load(folders / "ours").predict(WORDS)
    assert interactive.load(NAME).predict(WORDS) == expected
    assert not any(served.token.encode() in content for content in files.values())
    assert not any(str(folders).encode() in content for content in files.values())


def test_a_second_push_leaves_no_weights_of_the_first_and_keeps_a_written_card(served, folders):
    push(folders / "ours", "--format=huggingface", "--shard_size=8KB", "--private")
    assert served.repositories["model", NAME].private
    first = served.files(NAME)
    served.add(NAME, first | {"README.md": b"by hand", "LICENSE": b"mine"}, private=True)
    push(folders / "ours", "--format=huggingface")
    files = served.files(NAME)
    weights = {name for name in files if "safetensors" in name}
    assert len([name for name in first if "safetensors" in name]) > 2
    assert weights == {"model.safetensors"}
    assert (files["README.md"], files["LICENSE"]) == (b"by hand", b"mine")
    push(folders / "ours", "--format=huggingface")  # the same again is no mistake
    assert served.files(NAME) == files


def test_a_branch_is_pushed_to_alone(served, folders):
    push(folders / "hf", "--format=huggingface")
    main = served.files(NAME)
    convert.main([f"--from={folders / 'hf'}", f"--to={NAME}@half", "--push", "--dtype=float16"])
    assert served.files(NAME) == main
    assert "config.gin" in served.files(NAME, revision="half")


@pytest.mark.parametrize(
    "words, token, message",
    [
        (["--to=tester/toy", "--push"], "", "needs a token that may write: hf auth login"),
        (["--to=tester/toy", "--push"], "hf_wrong", "refuses tester/toy to the token in use"),
        (["--to=folder", "--push"], None, "--push uploads to --to=owner/name"),
        (["--to=tester/toy", "--private"], None, "--private is for a model that --push creates"),
    ],
)
def test_a_push_that_cannot_be_is_refused_before_anything_is_read(
    served, folders, monkeypatch, capsys, words, token, message
):
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(SystemExit) as ended:
        convert.main([f"--from={folders / 'ours'}", *words])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and message in error and "hf_wrong" not in error
    assert error.count("\n") == 1
    assert ("model", NAME) not in served.repositories


def test_a_dry_run_uploads_nothing(served, folders, capsys):
    push(folders / "ours", "--format=huggingface", "--dry_run")
    assert "Nothing was written" in capsys.readouterr().out
    assert ("model", NAME) not in served.repositories


def trained_run(folder: Path, secret: Path) -> Path:
    """A run folder with data, a report and the paths of one machine in its config."""
    vocabulary = config.Vocabulary("bytes")
    files = config.Files("letters", f"{secret}/train-*.jsonl", vocabulary, inputs="a")
    write_ours(folder, T5, Drawn(T5))
    run = config.Run(
        str(folder),
        T5,
        data=config.Data(files, {"inputs": 8, "targets": 8}, cache_dir=str(secret)),
        train=config.Train(300, 8),
        schedule=config.Schedule("constant", 0.1),
        checkpoint=config.Checkpoint(initial="owner/base@" + "a" * 40),
    )
    (folder / "config.gin").write_text(gin_file.to_text(run))
    (folder / "report.json").write_text(json.dumps(REPORT))
    return folder


@pytest.mark.parametrize("format", ["ours", "huggingface", "t5x"])
def test_every_export_has_a_card(tmp_path, folders, format):
    run = trained_run(tmp_path / "run", tmp_path / "secret")
    words = [f"--from={run}", f"--to={tmp_path / 'out'}", f"--format={format}", "--vocabulary=none"]
    convert.main(words)
    card = huggingface_hub.ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.pipeline_tag == "text2text-generation" and "t5" in card.data.tags
    assert card.data.base_model == "owner/base"
    library = "transformers" if format == "huggingface" else "t5x_lite"
    assert card.data.to_dict()["library_name"] == library
    text = card.text
    assert "encoder of 2 layers of width 8 and a decoder of 3" in text and "40 ids" in text
    assert "| exact_match | 0.25 |" in text and "| wer | 0.5 |" in text
    assert "compile_seconds" not in text and "On the split test, after 300 steps" in text
    assert "Task: letters. Tokens per row: inputs 8, targets 8." in text
    assert str(tmp_path) not in text and "'train-*.jsonl'" in text
    shown = gin_file.from_text(re.search(r"```gin\n(.*)```", text, re.DOTALL)[1])
    assert shown.model == T5 and shown.train == config.Train(300, 8)


@pytest.mark.slow
def test_the_code_of_a_card_loads_the_model(served, folders, capsys):
    push(folders / "ours", "--format=huggingface")
    text = served.files(NAME)["README.md"].decode()
    code = re.search(r"```python\n(.*?)\n\n(from transformers.*?)```", text, re.DOTALL)
    ours, theirs = code.groups()
    names: dict = {}
    exec(ours, names)
    assert isinstance(names["model"], interactive.Session)
    exec(theirs, names)
    assert type(names["model"]).__name__ == "T5ForConditionalGeneration"
    assert names["tokenizer"]("abba").input_ids[:4] == [3, 4, 4, 3]


def test_a_card_says_what_was_adapted_and_converted(tmp_path, served, folders):
    commit = served.add("owner/toy", {p.name: p.read_bytes() for p in (folders / "hf").iterdir()})
    convert.main(["--from=owner/toy", "--to=converted"])
    card = Path("converted/README.md").read_text()
    assert "base_model: owner/toy" in card and f"Converted from owner/toy@{commit}" in card
    adapt.main(["--source=owner/toy", "--to=decoder_only", "--output=adapted"])
    card = Path("adapted/README.md").read_text()
    assert "pipeline_tag: text-generation" in card and "owner/toy" in card
    assert open_checkpoint("converted").model == open_checkpoint(folders / "hf").model
    assert "model.safetensors" in list_cached(tmp_path / "cache")


def test_a_model_of_no_other_library_has_a_card_too():
    odd = dataclasses.replace(T5, logits_softcap=3.0)
    facts = model_card.CardFacts(config.Run("x", odd), "x", "ours", "", {}, 0, 1, "float32", False)
    text = model_card.format_card(facts)
    assert model_card.family_name(odd) is None and "tags:\n- t5x_lite\n---" in text


SECRETS = [
    "/home/alice/data/{}",
    "/home/alice/it's/data/{}",
    '/home/alice/"/data/{}',
    "~alice/{}",
    "~/alice/{}",
    "../../alice/{}",
    "/home/alice/" + "x " * 80 + "/data/{}",
    "/home/alice/{}/",
    "memory://alice/data/{}",
    "memory://me:alice@host/{}?signature=alice#alice",
]


def fields_with(path):
    """A run in which every field that names a path or a checkpoint is `path`."""
    vocabulary = config.Vocabulary("sentencepiece", path=path)
    files = config.Files("mine", path, vocabulary, validation=path, test=path)
    place = "/home/alice/runs" if "://" in path or path.startswith("~alice") else path
    hub = config.HubDataset(place, vocabulary)
    return config.Run(
        place,
        T5,
        data=config.Data(
            config.Mixture((files, hub), (1.0, 1.0)), {"inputs": 8, "targets": 8}, cache_dir=place
        ),
        adaptation=config.Adaptation(path, path),
        distillation=config.Distillation(path, top_k=2, answers=place),
        decode=config.Decode(
            drafter=f"lookup+draft:{path}",
            companion=f"model:{path}",
            temperature=1.0,
            n_best=2,
            choose=f"rerank:{path}",
        ),
        compare=config.Compare(seeds=1, trained={"causal_decoder": (path,)}),
    )


@pytest.mark.parametrize("template", SECRETS)
def test_a_card_names_no_folder_bucket_or_signature_of_the_machine_that_trained(template):
    path = template.format("kept.x")
    run = fields_with(path)
    facts = model_card.CardFacts(run, "x", "ours", path, {}, 0, 1, "float32", False)
    text = model_card.format_card(facts)
    assert "alice" not in text and text.count("kept.x") >= 8
    shown = gin_file.from_text(re.search(r"```gin\n(.*)```", text, re.DOTALL)[1])
    assert shown.model == T5


def test_an_address_without_a_path_is_not_shown():
    for address in ("memory://me:alice@host", "memory://alice", "https://h?signature=alice/kept"):
        assert model_card.shorten(address) == "."


def test_names_and_metrics_of_any_text_leave_a_card_whole():
    odd = 'a"b`c\n# d|e'
    report = {"split": odd, odd: 0.5, "steps": odd}
    run = dataclasses.replace(fields_with("kept.x"), model_dir="runs/x")
    facts = model_card.CardFacts(run, f"me/{odd}", "huggingface", "", report, 7, 1, "float32", True)
    text = model_card.format_card(facts)
    assert '# a"b`c # d\\|e\n' in text and "\n# d" not in text
    assert "after 7 steps" in text and '| a"b`c # d\\|e | 0.5 |' in text
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    assert [ast.literal_eval(call.args[0]) for call in calls].count(f"me/{odd}") == 3
