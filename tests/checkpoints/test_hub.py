# SPDX-License-Identifier: Apache-2.0
"""Laws of models by name: what the hub serves is what a local folder holds, and no more is read."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conversion_toys import T5, Drawn
from hub_server import HubServer
from hub_toys import list_cached, read_contents, write_folders
from test_opening import write_with_tokenizer

from t5x_lite import adapt, config, convert, infer, interactive
from t5x_lite.checkpoints import sources
from t5x_lite.checkpoints.formats import gguf_file as gguf_reader
from t5x_lite.checkpoints.formats import safetensors_files
from t5x_lite.checkpoints.opening import WEIGHTS_ONLY, open_checkpoint
from t5x_lite.checkpoints.text_settings import read_named_vocabulary, read_text_settings
from t5x_lite.data import open_vocabularies
from t5x_lite.utils import hub, hub_names, remote_folders

WORDS = ["abba", "cab", "d"]
NAME = "owner/toy"
# A file of no use here, as hubs are full of them.
OTHERS = {"README.md": b"# toy", "pytorch_model.bin": b"\x80", "onnx/model.onnx": b"0"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    return write_folders(tmp_path_factory.mktemp("folders"))


@pytest.fixture
def served(tmp_path, monkeypatch, folders):
    """A hub with the toys, which this process uses with an empty cache."""
    monkeypatch.chdir(tmp_path)
    with HubServer() as server:
        server.use_here(monkeypatch, tmp_path / "cache")
        server.add(NAME, read_contents(folders / "hf") | OTHERS)
        server.add("owner/shards", read_contents(folders / "shards") | OTHERS)
        server.add("owner/run", read_contents(folders / "ours") | {"README.md": b"# a run"})
        yield server


@pytest.mark.parametrize("name", [NAME, "owner/shards", "owner/run", f"hf://{NAME}@main"])
def test_a_model_by_name_writes_what_its_folder_writes(served, folders, name):
    session = interactive.load(name)
    assert session.source == name
    assert session.predict(WORDS) == interactive.load(folders / "hf").predict(WORDS)


@pytest.mark.parametrize("name", [NAME, "owner/shards", "owner/run"])
def test_only_files_that_are_read_are_downloaded(served, tmp_path, name):
    opened = set()

    def audit(event, arguments):
        if event == "open" and "snapshots" in str(arguments[0]):
            opened.add(Path(arguments[0]).name)

    sys.addaudithook(audit)  # until the process ends
    interactive.load(name)
    downloaded = {Path(file).name for file in list_cached(tmp_path / "cache")}
    # TensorStore opens the arrays of a run folder without Python.
    arrays = {Path(file).name for file in list_cached(tmp_path / "cache") if "params" in file}
    assert downloaded - arrays <= opened and "README.md" not in downloaded
    assert not downloaded & {Path(other).name for other in OTHERS}


def test_headers_are_read_by_ranges_and_a_shard_of_gigabytes_is_not(served, tmp_path):
    sizes = {"a.weight": (2**16, 2**16), "b.weight": (2**14, 2**16)}
    files: dict[str, bytes | Path] = {"config.json": b'{"model_type": "t5"}'}
    for number, (name, shape) in enumerate(sizes.items()):
        nbytes = 4 * shape[0] * shape[1]
        header = json.dumps(
            {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, nbytes]}}
        ).encode()
        file = tmp_path / f"model-{number}.safetensors"
        with file.open("wb") as stream:
            stream.write(len(header).to_bytes(8, "little") + header)
            stream.truncate(8 + len(header) + nbytes)
        files[file.name] = file
    shards = {name: f"model-{number}.safetensors" for number, name in enumerate(sizes)}
    files["model.safetensors.index.json"] = json.dumps({"weight_map": shards}).encode()
    served.add("owner/large", files)
    located = sources.locate_source("owner/large")
    source = safetensors_files.open_safetensors(located.path, located.repository)
    assert {name: shape for name, (shape, _) in source.names.items()} == sizes
    assert sum(int(np.prod(shape)) * 4 for shape in sizes.values()) > 20e9
    assert served.bytes_sent("safetensors") <= 2 * remote_folders.FIRST_BYTES
    assert not any("safetensors" in name and "json" not in name for name in list_cached(tmp_path))


def test_a_header_longer_than_the_first_request_is_read_in_two(served, monkeypatch, tmp_path):
    monkeypatch.setattr(remote_folders, "FIRST_BYTES", 100)
    opened = open_checkpoint("owner/shards", options=WEIGHTS_ONLY)
    names = opened.weights(read=False).names
    assert not any(name.endswith(".safetensors") for name in list_cached(tmp_path / "cache"))
    weights = opened.weights()
    assert weights.names == names
    np.testing.assert_array_equal(
        weights.read("encoder/layers/mlp/up", 1), Drawn(T5).read("encoder/layers/mlp/up", 1)
    )


@pytest.fixture
def gguf_file(served, tmp_path) -> Path:
    """A Llama as a .gguf file of the hub, owner/gguf:toy.gguf, and of this machine."""
    path = tmp_path / "local" / "toy.gguf"
    path.parent.mkdir()
    write_with_tokenizer(path)
    served.add("owner/gguf", {"toy.gguf": path.read_bytes()})
    return path


def test_the_header_of_a_gguf_file_is_read_by_ranges(served, gguf_file, monkeypatch, tmp_path):
    monkeypatch.setattr(remote_folders, "FIRST_BYTES", 100)
    opened = open_checkpoint("owner/gguf:toy.gguf")
    local = open_checkpoint(gguf_file)
    assert opened.weights(read=False).names == local.weights(read=False).names
    assert opened.text.vocabularies[0].encode("abba ab") == [32, 3, 29, 31]
    begin = min(tensor.begin for tensor in gguf_reader.open_gguf(gguf_file).tensors.values())
    assert served.bytes_sent("gguf") <= 2 * begin < gguf_file.stat().st_size
    answered = [each for each in served.downloads("gguf") if each.status == 206]
    assert len(answered) <= 2 + np.log2(begin / 100)
    assert list_cached(tmp_path / "cache") == set()
    for path, (_, layers) in {"decoder/layers/mlp/up": (0, 5), "embedding": (0, None)}.items():
        np.testing.assert_array_equal(
            opened.weights().read(path, layers), local.weights().read(path, layers)
        )
    assert list_cached(tmp_path / "cache") == {"toy.gguf"}


@pytest.mark.parametrize("name", ["owner/run", "owner/gguf:toy.gguf"])
def test_a_dry_run_lists_what_a_conversion_writes_and_downloads_no_weight(
    served, gguf_file, tmp_path, capsys, name
):
    words = [f"--from={name}", "--to=out", "--format=huggingface"]

    def cached_weights() -> list[str]:
        cached = list_cached(tmp_path / "cache")
        return [each for each in cached if each.endswith(".gguf") or "/params/" in each]

    convert.main([*words, "--dry_run"])
    assert "Nothing was written" in capsys.readouterr().out and cached_weights() == []
    convert.main(words)
    assert cached_weights() != []


@pytest.mark.parametrize(
    "command",
    [
        [convert, "--from={}", "--to=out", "--dry_run"],
        [convert, "--from={}", "--to=out", "--format=huggingface", "--dry_run"],
        [adapt, "--source={}", "--to=decoder_only", "--output=out", "--dry_run"],
    ],
)
def test_a_dry_run_downloads_no_weight(served, tmp_path, capsys, command):
    module, *words = command
    module.main([word.format("owner/shards") for word in words])
    out = capsys.readouterr().out
    assert "Nothing was written" in out and "decoder" in out
    assert not any(name.endswith(".safetensors") for name in list_cached(tmp_path / "cache"))
    with pytest.raises(SystemExit) as ended:
        module.main([word.format("owner/absent") for word in words])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and "no model of that name on the hub" in error
    assert error.count("\n") == 1


def test_a_cut_download_goes_on_and_a_killed_one_keeps_what_is_complete(served, tmp_path, folders):
    shards = sorted(path.name for path in (folders / "shards").glob("*.safetensors"))
    served.cut_after[shards[0]] = [3000, 1000]
    interactive.load("owner/shards")
    for shard in shards:
        (path,) = (tmp_path / "cache").glob(f"hub/*/snapshots/*/{shard}")
        assert path.read_bytes() == (folders / "shards" / shard).read_bytes()
    before = len(served.downloads("safetensors"))
    interactive.load("owner/shards")
    assert len(served.downloads("safetensors")) == before
    path.unlink()  # as after a command that was killed during the last one
    interactive.load("owner/shards")
    assert {each.path.rpartition("/")[2] for each in served.downloads()[-1:]} == {shards[-1]}


@pytest.mark.slow
def test_a_killed_command_resumes(served, tmp_path, folders):
    files = read_contents(folders / "shards")
    shards = sorted(name for name in files if name.endswith(".safetensors"))
    command = [sys.executable, "-c", "from t5x_lite.checkpoints import sources, opening; "]
    command[-1] += "opening.open_checkpoint('owner/shards', options=opening.WEIGHTS_ONLY).weights()"
    environment = os.environ | served.environment(tmp_path / "other")
    served.delay = 0.5
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while not served.downloads(".safetensors") and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.wait()
    served.delay = 0.0
    subprocess.run(command, env=environment, check=True, capture_output=True)
    for shard in shards:
        (path,) = (tmp_path / "other").glob(f"hub/*/snapshots/*/{shard}")
        assert path.read_bytes() == files[shard]


def test_without_the_hub_the_cache_is_read_and_says_so(served, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    absent = f"There is no {NAME} here or in the cache .*_OFFLINE is set"
    with pytest.raises(ValueError, match=absent):
        interactive.load(NAME)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    expected = interactive.load(NAME).predict(WORDS)
    served.down = True
    capsys.readouterr()
    assert interactive.load(NAME).predict(WORDS) == expected
    assert "read from the cache, commit" in capsys.readouterr().err
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    count = len(served.served)
    assert interactive.load(NAME).predict(WORDS) == expected
    assert len(served.served) == count
    with pytest.raises(ValueError, match="There is no owner/shards here or in the cache"):
        interactive.load("owner/shards")


def test_a_cached_model_costs_one_request(served):
    interactive.load(NAME)
    count = len(served.served)
    interactive.load(NAME)
    assert [each.path for each in served.served[count:]] == [f"/api/models/{NAME}"]


def test_a_revision_is_what_it_was(served, folders):
    first = served.add(NAME, read_contents(folders / "hf"), revision="v1")
    changed = read_contents(folders / "hf") | {"config.json": b"{}"}
    served.add(NAME, changed)
    assert interactive.load(f"{NAME}@v1").predict(WORDS) == interactive.load(
        f"{NAME}@{first}"
    ).predict(WORDS)
    assert hub.pin_source(f"{NAME}@v1") == f"{NAME}@{first}"
    with pytest.raises(ValueError, match="has no model_type"):
        interactive.load(NAME)
    with pytest.raises(ValueError, match=f"{NAME} has no revision v2 on the hub"):
        interactive.load(f"{NAME}@v2")


@pytest.mark.parametrize("token", [None, "hf_wrong", HubServer.token])
def test_gated_and_private_models_name_the_remedy(served, monkeypatch, folders, token, capsys):
    served.add("owner/gated", read_contents(folders / "hf"), gated=True)
    served.add("owner/private", read_contents(folders / "hf"), private=True)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    if token == served.token:
        for name in ("gated", "private"):
            assert interactive.load(f"owner/{name}").predict(WORDS)
        return
    log_in = "account of the token" if token else "hf auth login, or HF_TOKEN"
    with pytest.raises(ValueError, match=f"owner/gated is gated: accept .*/owner/gated.*{log_in}"):
        interactive.load("owner/gated")
    access = "the token in use may not read it" if token else "log in: hf auth login"
    with pytest.raises(ValueError, match=f"no model of that name on the hub .*{access}"):
        interactive.load("owner/private")
    with pytest.raises(SystemExit):
        convert.main(["--from=owner/gated", "--to=out"])
    assert "hf_wrong" not in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    "files, message",
    [
        ({"config.json": b"{}", "pytorch_model.bin": b""}, "pickle.*safe_serialization=True"),
        ({"a-Q4.gguf": b"", "a-Q8.gguf": b""}, r"such as owner/x:a-Q4.gguf \(or another of its 2"),
        ({"README.md": b""}, "owner/x is not a checkpoint"),
        ({"config.json": b"{}", "adapter_config.json": b"{}"}, "does not say what model"),
        ({"config.json": b"{}", "model.safetensors": b"12"}, "not a complete safetensors file"),
    ],
    ids=["pickle", "gguf", "nothing", "adapter", "cut"],
)
def test_a_model_that_is_not_read_says_what_it_is(served, files, message):
    served.add("owner/x", files)
    with pytest.raises(ValueError, match=message):
        open_checkpoint("owner/x")
    assert served.bytes_sent() < 1000


def test_a_local_folder_wins_and_says_so(served, tmp_path, folders, capsys):
    assert isinstance(hub_names.parse_source(NAME), hub_names.HubName)
    (tmp_path / "owner").mkdir()
    assert hub_names.parse_source(NAME) == Path(
        NAME
    )  # beside folders that are here: not sent anywhere
    assert isinstance(hub_names.parse_source(f"hf://{NAME}"), hub_names.HubName)
    (tmp_path / NAME).symlink_to(folders / "hf")
    capsys.readouterr()
    count = len(served.served)
    interactive.load(NAME)
    assert f"{NAME} is the folder here; hf://{NAME} would be" in capsys.readouterr().err
    assert len(served.served) == count
    (tmp_path / "owner" / "run").symlink_to(folders / "ours")
    interactive.load("owner/run")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("text", ["runs/mine", "./a/b", "~/a/b", "/a/b", "a/b/c", "a", "x/y.gguf"])
def test_paths_are_not_names(served, text):
    assert isinstance(hub_names.parse_source(text), Path)
    assert served.served == []


@pytest.mark.parametrize(
    "text", ["a/b@../c", "a/b:../../x", "a/b:c/../../x", "a/b@", "a/b:", "-a/b", "a/b@c d", "a/bä"]
)
def test_names_lead_to_no_other_place(served, text):
    assert isinstance(hub_names.parse_source(text), Path)


def test_the_page_of_a_model_is_answered_with_its_name(served):
    with pytest.raises(ValueError, match="name the model, google/flan-t5-small"):
        interactive.load("https://huggingface.co/google/flan-t5-small/tree/main")


def test_vocabularies_by_name(served, folders):
    wanted = read_text_settings(folders / "hf").vocabularies
    named = config.Vocabulary(kind="checkpoint", path="owner/shards")
    one = config.Vocabulary(kind="tokenizer_json", path=f"{NAME}:tokenizer.json")
    for vocabulary in (named, one):
        data = config.Data(task="cmudict_g2p", lengths={"targets": 8}, vocabulary=vocabulary)
        assert open_vocabularies(data)[0].size == wanted[0].size
    assert served.bytes_sent(".safetensors") == 0
    text = read_named_vocabulary(NAME, 0)
    assert text is not None and text.vocabularies[0].size == wanted[0].size
    with pytest.raises(ValueError, match=f"{NAME} is a model: name its file"):
        open_vocabularies(
            config.Data(
                task="cmudict_g2p",
                lengths={"targets": 8},
                vocabulary=config.Vocabulary(kind="tokenizer_json", path=NAME),
            )
        )


@pytest.mark.slow
def test_a_draft_model_by_name(served, folders):
    session = interactive.load(folders / "hf")
    drafted = session.predict(WORDS, drafter=f"draft:{NAME}", draft_length=3)
    assert [each.texts for each in drafted] == [each.texts for each in session.predict(WORDS)]


def test_an_output_belongs_to_a_commit(served, folders, tmp_path):
    (tmp_path / "words.txt").write_text("abba\n")
    words = ["--input=words.txt", "--output=out.jsonl"]
    infer.main([f"--checkpoint={NAME}", *words])
    infer.main([f"--checkpoint={NAME}@main", *words])
    served.add(NAME, read_contents(folders / "hf") | {"new.txt": b""})
    with pytest.raises(SystemExit):
        infer.main([f"--checkpoint={NAME}", *words])


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"..", b"a\0b", 9999 * b"a"])
def test_a_damaged_reference_of_the_cache_is_none(content, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    name = hub_names.HubName("owner/name")
    reference = hub.cache_entry(name) / "refs" / "main"
    reference.parent.mkdir(parents=True)
    reference.write_bytes(content)
    (hub.cache_entry(name) / "snapshots").mkdir()
    with pytest.raises(hub.HubError, match="There is no owner/name here or in the cache"):
        hub.open_cached(name, "the hub is not asked")
