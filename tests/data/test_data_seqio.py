# SPDX-License-Identifier: Apache-2.0
"""seqio in both directions: its tasks, mixtures and TFDS sources read here, ours read there."""

from collections import Counter

import numpy as np
import pytest

pytest.importorskip("seqio")

import seqio
import tensorflow as tf

from t5x_lite import config, data
from t5x_lite.config import windows
from t5x_lite.data import built_in, cache, mixing, objectives, randomness, rows, seqio_tasks
from t5x_lite.tokenizers import sentencepiece_training, vocabularies
from t5x_lite.tokenizers.seqio_vocabularies import SeqioVocabulary

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
COUNT = 40


def source(split, shuffle_files, seed=None):
    """Examples of a function data source.

    Args:
      split: unused; all splits are alike.
      shuffle_files: unused.
      seed: unused.
    """
    words = [f"word {i} é" for i in range(COUNT)]
    answers = [f"{i % 3} and some" for i in range(COUNT)]
    return tf.data.Dataset.from_tensor_slices({"inputs": words, "targets": answers})


def accuracy(targets, predictions):
    """Share of predictions that equal their target."""
    return {"accuracy": np.mean([a == b for a, b in zip(targets, predictions, strict=True)])}


def first_word(text, example=None, is_target=False):
    """First word of a text, as a postprocessor of seqio.

    Args:
      text: the text.
      example: unused.
      is_target: unused.
    """
    return text.split()[0] if text else ""


def add(name, vocabulary, eos=True, preprocessors=None, feature_names=("inputs", "targets")):
    """Registers a Task in seqio.

    Args:
      name: of the task.
      vocabulary: of its features.
      eos: true to add ends.
      preprocessors: of the task; None tokenizes.
      feature_names: of the output.
    """
    if preprocessors is None:
        preprocessors = [seqio.preprocessors.tokenize]
        preprocessors += [seqio.preprocessors.append_eos_after_trim] if eos else []
    return seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(source, splits=["train", "validation"]),
        preprocessors=preprocessors,
        output_features={each: seqio.Feature(vocabulary, add_eos=eos) for each in feature_names},
        postprocess_fn=first_word,
        metric_fns=[accuracy],
    )


@pytest.fixture(scope="module", autouse=True)
def registered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seqio")
    (folder / "pieces.model").write_bytes(
        sentencepiece_training.train_sentencepiece(["word some and é 0123456789"] * 50, 300)
    )
    byte = seqio.ByteVocabulary(extra_ids=100)
    add("law_bytes", byte)
    add("law_endless", byte, eos=False)
    add("law_pieces", seqio.SentencePieceVocabulary(str(folder / "pieces.model"), extra_ids=5))

    def rekey(data):
        return data.map(lambda each: {"targets": each["inputs"]})

    denoise = seqio_tasks.preprocessor(config.SpanCorruption(), seed=4)
    add("law_spans", byte, preprocessors=[rekey, seqio.preprocessors.tokenize, denoise])
    add("law_no_targets", byte, feature_names=("inputs",))
    add("law_codepoints", seqio.FullCodepointVocabulary())
    image = seqio.Feature(byte, rank=2)
    seqio.TaskRegistry.add(
        "law_images",
        source=seqio.FunctionDataSource(source, splits=["train"]),
        preprocessors=[],
        output_features={"targets": image},
    )
    seqio.MixtureRegistry.add("law_mixture", [("law_bytes", 3), ("law_spans", 1)])
    seqio_tasks.register_built_ins()
    seqio.MixtureRegistry.add("law_with_ours", [("stdlib_docstrings", 1), ("law_bytes", 1)])
    return folder


def described(task, folder, **changes) -> config.Data:
    """Data of a seqio Task.

    Args:
      task: its name.
      folder: of the cache.
      **changes: other fields of config.Data.
    """
    fields = dict(lengths={"inputs": 32, "targets": 32}, cache_dir=str(folder / "cache"))
    return config.Data(task, **(fields | changes))


def ids_of(dataset) -> list:
    """Input and target ids of every example."""
    pairs = (dataset.ids(i) for i in range(len(dataset)))
    return [(inputs.tolist(), targets.tolist()) for inputs, targets in pairs]


@pytest.mark.parametrize("name", ["law_bytes", "law_endless", "law_pieces"])
def test_a_seqio_task_gives_the_ids_that_seqio_gives(name, registered):
    cfg = described(name, registered)
    theirs = seqio.get_mixture_or_task(name).get_dataset(None, "train", shuffle=False)
    wanted = [(e["inputs"].tolist(), e["targets"].tolist()) for e in theirs.as_numpy_iterator()]
    assert ids_of(data.open_dataset(cfg, "train")) == wanted
    batches = data.open_batches(cfg, "encoder_decoder", 4, 0)
    counts = Counter()
    for batch in batches.evaluation():
        counts.update(batch.targets[batch.target_segments > 0].tolist())
    assert counts == Counter(token for _, targets in wanted for token in targets)


def test_unpacked_rows_are_those_of_seqios_own_converter(registered):
    lengths = {"inputs": 32, "targets": 32}
    theirs = seqio.get_dataset(
        "law_bytes", lengths, seqio.EncDecFeatureConverter(pack=False), "train", shuffle=False
    )
    cfg = described("law_bytes", registered, lengths=lengths, pack=False)
    (ours,) = data.open_batches(cfg, "encoder_decoder", COUNT, 0).evaluation()
    for row, example in enumerate(theirs.as_numpy_iterator()):
        np.testing.assert_array_equal(ours.inputs[row], example["encoder_input_tokens"])
        np.testing.assert_array_equal(ours.targets[row], example["decoder_target_tokens"])
        np.testing.assert_array_equal(ours.loss_weights[row], example["decoder_loss_weights"])


def test_joined_rows_are_those_of_seqios_prefix_lm_converter(registered):
    lengths = {"inputs": 32, "targets": 32}
    theirs = seqio.get_dataset(
        "law_bytes", lengths, seqio.PrefixLMFeatureConverter(pack=False), "train", shuffle=False
    )
    cfg = described("law_bytes", registered, lengths=lengths, pack=False)
    (ours,) = data.open_batches(cfg, "decoder_only", COUNT, 0).evaluation()
    for row, example in enumerate(theirs.as_numpy_iterator()):
        np.testing.assert_array_equal(ours.targets[row], example["decoder_target_tokens"])
        np.testing.assert_array_equal(ours.loss_weights[row], example["decoder_loss_weights"])


@pytest.mark.parametrize("name", ["law_bytes", "law_endless", "law_pieces"])
def test_a_seqio_vocabulary_becomes_ours(name, registered, tmp_path):
    cfg = described(name, registered)
    vocabularies.save_pair(tmp_path, *data.open_vocabularies(cfg))
    ours, _ = vocabularies.load_pair(tmp_path)
    theirs = seqio.get_mixture_or_task(name).output_features["inputs"].vocabulary
    for text in ("word 17 é", "some <extra_id_1> and"):
        if name == "law_pieces" or "extra" not in text:
            assert ours.encode(text) == list(theirs.encode(text))
    assert ours.size == theirs.vocab_size
    assert ours.decode(ours.encode("word 17 é")) == "word 17 é"
    assert ours.ends == (name != "law_endless")


def test_text_and_metrics_of_a_seqio_task_are_its_own(registered):
    dataset = data.open_dataset(described("law_bytes", registered), "validation")
    assert dataset.inputs_text(3) == "word 3 é" and dataset[3].targets == "0 and some"
    # The task's postprocessor keeps the first word of answer and prediction.
    assert dataset.score(["0 x", "1 y", "1 z"]) == ({"accuracy": pytest.approx(2 / 3)}, {})


def test_a_changed_seqio_task_is_read_anew(registered):
    first = seqio_tasks.source(seqio.TaskRegistry.get("law_bytes"), None, "train")
    assert first == seqio_tasks.source(seqio.TaskRegistry.get("law_bytes"), None, "train")
    other = seqio.TaskRegistry.get("law_endless")
    assert first != seqio_tasks.source(other, None, "train")


def test_the_objective_as_preprocessor_gives_the_text_back(registered):
    dataset = data.open_dataset(described("law_spans", registered), "train")
    text = []
    for inputs, targets in ids_of(dataset):
        assert len(inputs) <= 32 and inputs[-1] == targets[-1] == 1
        runs = {}
        for token in targets[:-1]:
            if token >= 259:
                runs[token] = run = []
            else:
                run.append(token)
        for token in inputs[:-1]:
            text += runs[token] if token >= 259 else [token]
    whole = "".join(f"word {i} é\n" for i in range(COUNT)).encode()
    result = bytes(token - 3 for token in text)
    assert result == whole[: len(result)] and len(whole) - len(result) <= 1


OBJECTIVES = [
    config.SpanCorruption(mode="[NLU]"),
    config.PrefixLM(),
    config.PrefixLM(0.3, "fixed"),
    config.FillInTheMiddle("spm"),
    config.CausalLM(),
]


def cut_by_seqio(objective, vocabulary, lengths, text) -> list[dict]:
    """Inputs and targets that the preprocessor cuts from tokenized examples.

    Args:
      objective: its config.
      vocabulary: of the text.
      lengths: of the features.
      text: token ids of each example.
    """
    examples = tf.data.Dataset.from_generator(
        lambda: ({"targets": ids} for ids in text),
        output_signature={"targets": tf.TensorSpec([None], tf.int32)},
    )
    names = ["targets"] if isinstance(objective, config.CausalLM) else ["inputs", "targets"]
    features = {name: seqio.Feature(SeqioVocabulary(vocabulary)) for name in names}
    cut = seqio_tasks.preprocessor(objective, seed=4)
    return list(cut(examples, lengths, features).as_numpy_iterator())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_gives_seqio_the_bits_of_the_batch_builder(objective, registered):
    vocabulary = vocabularies.ByteVocabulary(extra_ids=30)
    text = [np.array([*vocabulary.encode(f"word {i} é"), 1], np.int32) for i in range(COUNT)]
    causal = isinstance(objective, config.CausalLM)
    lengths = {"targets": 32} if causal else {"inputs": 32, "targets": 24}
    result = cut_by_seqio(objective, vocabulary, lengths, text)

    offsets = np.cumsum([0, *map(len, text)])
    feature = cache.Feature(np.concatenate(text), offsets, 1, ends=True)
    fit = windows.length_limits(lengths, "decoder_only" if causal else "encoder_decoder")
    preprocessor = objectives.make_preprocessor(objective, fit, vocabulary)
    stream = rows.Stream(feature, preprocessor)
    key = randomness.key(4)
    for number, begin in enumerate(range(0, stream.size, preprocessor.window)):
        tokens = min(preprocessor.window, stream.size - begin)
        if tokens < 2:
            break
        window = stream.windows(np.array([begin]), tokens)
        inputs, targets = preprocessor.parts(window, randomness.keys(key, np.array([number])))
        np.testing.assert_array_equal(result[number]["targets"], targets.tokens)
        if not causal:
            np.testing.assert_array_equal(result[number]["inputs"], inputs.tokens)
    assert len(result) in (number, number + 1)


def test_denoisers_are_drawn_in_seqio_as_in_batches():
    mixture = config.Denoisers((config.PrefixLM(mode="P"), config.FillInTheMiddle()), (1, 3))
    vocabulary = vocabularies.ByteVocabulary(extra_ids=30)
    text = [np.array(vocabulary.encode(f"word {i} é"), np.int32) for i in range(300)]
    result = cut_by_seqio(mixture, vocabulary, {"inputs": 16, "targets": 16}, text)
    prefix = np.array([each["inputs"][0] == ord("P") + 3 for each in result])
    drawn, _ = mixing.MixtureSampler([1, 3], randomness.key(4, "mixture")).draw(
        np.arange(len(result))
    )
    assert len(result) > 100 and not prefix.all()
    np.testing.assert_array_equal(prefix, drawn == 0)


def test_an_objective_that_makes_inputs_needs_the_feature():
    with pytest.raises(ValueError, match='PrefixLM makes inputs: add "inputs"'):
        cut = seqio_tasks.preprocessor(config.PrefixLM())
        features = {"targets": seqio.Feature(seqio.ByteVocabulary())}
        cut(tf.data.Dataset.from_tensors({"targets": [5]}), {"targets": 9}, features)


def test_a_seqio_mixture_is_drawn_at_its_rates(registered):
    batches = data.open_batches(
        described("law_mixture", registered, pack=False), "encoder_decoder", 4000, 0
    )
    targets = batches.at(0).targets
    spans = (targets >= 259).any(axis=1).mean()
    assert spans == pytest.approx(0.25, abs=0.001)


def test_ours_read_through_seqio_give_our_ids(registered):
    theirs = seqio.get_mixture_or_task("cmudict_g2p").get_dataset(None, "validation", shuffle=False)
    chunk = next(built_in.built_in_task("cmudict_g2p", None, "").read("validation"))
    for example, inputs, targets in zip(
        theirs.take(20).as_numpy_iterator(), chunk.inputs, chunk.targets, strict=False
    ):
        np.testing.assert_array_equal(example["inputs"], inputs)
        np.testing.assert_array_equal(example["targets"], targets)


def test_our_vocabulary_works_inside_seqio():
    ours = vocabularies.SymbolVocabulary(["AA", "B"], separator=" ", extra_ids=2)
    theirs = SeqioVocabulary(ours)
    ids = theirs.encode_tf(tf.constant("AA B")).numpy().tolist()
    assert ids == theirs.encode("AA B") == ours.encode("AA B")
    assert theirs.decode_tf(tf.constant([ids + [1, 0]])).numpy().tolist() == [b"AA B"]
    assert (
        theirs
        == SeqioVocabulary(ours)
        != seqio_tasks.SeqioVocabulary(vocabularies.ByteVocabulary())
    )


@pytest.mark.parametrize("objective", [None, config.CausalLM()])
def test_a_seqio_task_streams_as_it_is_cached(objective, registered):
    lengths = {"inputs": 32, "targets": 32}
    cfg = described("law_bytes", registered, lengths=lengths, objective=objective, stream=True)
    batches = data.open_batches(cfg, "decoder_only", 3, 0)
    state = [batches.state() for _ in range(1)][0]
    forward = [batches.at(step) for step in range(12)]
    again = data.open_batches(cfg, "decoder_only", 3, 0)
    again.restore(state)
    np.testing.assert_array_equal(again.at(9).targets, forward[9].targets)


@pytest.mark.parametrize(
    "name, message",
    [
        ("law_byte", "'law_byte' is not registered: did you mean .*law_bytes.*--import="),
        ("law_no_targets", "no output feature \"targets\", only 'inputs'"),
        ("law_images", "targets: rank 2 of int32 is not a row of ids"),
        ("law_codepoints", "FullCodepointVocabulary cannot be kept with a run"),
    ],
)
def test_a_task_that_cannot_be_read_says_why(name, message, registered):
    with pytest.raises(ValueError, match=message):
        data.open_batches(described(name, registered), "encoder_decoder", 4, 0)


def test_a_seqio_task_keeps_its_own_vocabulary(registered):
    cfg = described("law_bytes", registered, vocabulary=config.Vocabulary("bytes"))
    with pytest.raises(ValueError, match="leave out Data.vocabulary"):
        data.open_batches(cfg, "encoder_decoder", 4, 0)


def test_a_tfds_source_is_read(registered, tmp_path):
    import tensorflow_datasets as tfds

    class Toy(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"en": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(30), "validation": self._generate_examples(5)}

        def _generate_examples(self, count):
            for i in range(count):
                yield i, {"en": f"sentence {i}"}

    Toy(data_dir=str(tmp_path)).download_and_prepare()

    def rekey(data):
        return data.map(
            lambda each: {"inputs": each["en"], "targets": tf.strings.upper(each["en"])}
        )

    byte = seqio.Feature(seqio.ByteVocabulary())
    seqio.TaskRegistry.add(
        "law_tfds",
        source=seqio.TfdsDataSource(tfds_name="toy:1.0.0", tfds_data_dir=str(tmp_path)),
        preprocessors=[
            rekey,
            seqio.preprocessors.tokenize,
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features={"inputs": byte, "targets": byte},
    )
    cfg = described("law_tfds", tmp_path)
    dataset = data.open_dataset(cfg, "train")
    assert sorted(row.targets for row in dataset) == sorted(f"SENTENCE {i}" for i in range(30))
    assert len(data.open_dataset(cfg, "validation")) == 5
    assert data.open_batches(cfg, "encoder_decoder", 4, 0).at(0).targets.any()
