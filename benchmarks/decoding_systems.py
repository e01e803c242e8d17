# SPDX-License-Identifier: Apache-2.0
"""The systems of decoding.py: each writes ids after ids, greedily, with the same weights."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Ids = list[int]
Write = Callable[[Sequence[Ids]], list[Ids]]


class RandomModel(NamedTuple):
    """A model of random weights that transformers makes, for speed alone.

    Attributes:
      kind: class in transformers.
      config: fields of its config.
      pieces: number of tokens that its tokenizer knows.
      special: ids of special tokens, by their name for a tokenizer and their text.
      enlarged: endings of the names of weights that are enlarged.
      factor: by which they are; otherwise all texts would be alike.
    """

    kind: str
    config: dict[str, Any]
    pieces: int
    special: dict[tuple[str, str], int]
    enlarged: tuple[str, ...]
    factor: float


T5_BASE = {
    "vocab_size": 32128,
    "d_model": 768,
    "d_kv": 64,
    "d_ff": 3072,
    "num_layers": 12,
    "num_decoder_layers": 12,
    "num_heads": 12,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
BART_BASE = {
    "vocab_size": 50265,
    "d_model": 768,
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 6),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 12),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 3072),
    "max_position_embeddings": 1024,
    "decoder_start_token_id": 2,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "forced_eos_token_id": None,
    "normalize_before": False,  # CTranslate2 reads it
}
# The base models of OPUS-MT.
MARIAN_BASE = {
    "vocab_size": 58101,
    "d_model": 512,
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 6),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 8),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 2048),
    "max_position_embeddings": 512,
    "activation_function": "swish",
    "scale_embedding": True,
    "decoder_start_token_id": 58100,
    "pad_token_id": 58100,
    "eos_token_id": 0,
    "forced_eos_token_id": None,
}
EOS_TOKEN, PAD_TOKEN, UNK_TOKEN = (
    ("eos_token", "</s>"),
    ("pad_token", "<pad>"),
    ("unk_token", "<unk>"),
)
BART_LIKE = ("_proj.weight", "fc1.weight", "fc2.weight")
RANDOM_MODELS = {
    "t5_base": RandomModel(
        "T5ForConditionalGeneration",
        T5_BASE,
        32100,
        {PAD_TOKEN: 0, EOS_TOKEN: 1, UNK_TOKEN: 2},
        ("SelfAttention.q.weight", "EncDecAttention.q.weight"),
        4,
    ),
    "bart_base": RandomModel(
        "BartForConditionalGeneration",
        BART_BASE,
        50265,
        {("bos_token", "<s>"): 0, PAD_TOKEN: 1, EOS_TOKEN: 2, UNK_TOKEN: 3},
        BART_LIKE,
        3,
    ),
    "marian_base": RandomModel(
        "MarianMTModel",
        MARIAN_BASE,
        58101,
        {EOS_TOKEN: 0, UNK_TOKEN: 1, PAD_TOKEN: 58100},
        BART_LIKE,
        3,
    ),
}


class Case(NamedTuple):
    """Inputs of one model, to be continued by `length` tokens, or to EOS unless `forced`.

    folder is a Hugging Face folder; rows are the encoder's inputs or, without a pair, prompts. half
    says that the weights are numbers of float16, so that they may be kept in it. gguf is the file
    that folder was made of, if it was; run a run folder whose heads are not in it.
    """

    name: str
    folder: Path
    pair: bool
    rows: list[Ids]
    length: int
    forced: bool = False
    half: bool = False
    gguf: Path | None = None
    run: str | None = None


class Model(NamedTuple):
    """Our side of a case: config, weights that are prepared, and what ends a text."""

    cfg: Any
    params: Any
    stops: tuple[int, ...]


def cut(ids: Sequence[int], stops: Sequence[int]) -> Ids:
    """ids up to the first that ends a text; that one is left out, as CTranslate2 does."""
    ends = [place for place, token in enumerate(ids) if token in stops]
    return list(ids[: ends[0]] if ends else ids)


def write_random_model(name: str, folder: Path) -> None:
    """Writes a key of RANDOM_MODELS to folder, with a tokenizer of as many words.

    Weights are drawn as transformers does and rounded to float16.
    """
    import tokenizers
    import torch
    import transformers

    if (folder / "config.json").exists():
        return
    random = RANDOM_MODELS[name]
    torch.manual_seed(0)
    kind = getattr(transformers, random.kind)
    model = kind(kind.config_class(**random.config)).eval()
    with torch.no_grad():
        for each, weight in model.named_parameters():
            if each.endswith(random.enlarged):
                weight.mul_(random.factor)
        if hasattr(model, "final_logits_bias"):
            # No system writes them, whether it is kept from doing so or not.
            unwritten = [model.config.eos_token_id, model.config.pad_token_id]
            model.final_logits_bias[0, unwritten] = -1e4
    names = {token: text for (_, text), token in random.special.items()}
    table = {names.get(token, f"w{token}"): token for token in range(random.pieces)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(table, unk_token="<unk>"))
    special = dict(random.special.keys())
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)
    wrapped.save_pretrained(folder)
    model.half().save_pretrained(folder)


def loaded(folder: Path) -> Model:
    """Our model of a Hugging Face folder, whose tokenizer is not needed."""
    from t5x_lite import config, decoding, sharding
    from t5x_lite.checkpoints import tensors, weights

    sharding.use_mesh(config.Mesh())
    found = tensors.open_hugging_face_tensors(folder)
    eos = json.loads((folder / "config.json").read_text())["eos_token_id"]
    stops = tuple(eos) if isinstance(eos, list) else (eos,)
    params = weights.place_weights(found.weights(()), found.model)
    # Prompts are ids, for every system the same: nothing is put before them.
    cfg = dataclasses.replace(found.model, add_bos=False)
    return Model(cfg, decoding.prepare_params(cfg, params), stops)


def restored(run: str, stops: tuple[int, ...]) -> Model:
    """Our model of a run folder, with its heads."""
    from t5x_lite import decoding
    from t5x_lite.checkpoints.opening import open_checkpoint

    found = open_checkpoint(run).load()
    return Model(found.run.model, decoding.prepare_params(found.run.model, found.params), stops)


def ours(case: Case, model: Model, decoder: str, width: int = 0, compute: str = "auto") -> Write:
    """t5x_lite with a drafter by name; adds its calls to `write.calls`.

    Args:
      case: what is written.
      model: our side of the case.
      decoder: name of the drafter.
      width: tokens of a block; 0 for one by measurement.
      compute: Decode.compute.
    """
    from t5x_lite import config, decoding
    from t5x_lite.evaluation.drafting import DrafterCache
    from t5x_lite.model.computation import params_for_compute

    decode = config.Decode(
        max_new_tokens=case.length, drafter=decoder, draft_length=width, compute=compute
    )
    params = params_for_compute(model.cfg, model.params, compute)
    drafters = DrafterCache(model.cfg, None)
    drafters.tiered.at_once = True
    # An id that no token has: nothing ends a text.
    eos = -1 if case.forced else list(model.stops)

    def write(rows: Sequence[Ids]) -> list[Ids]:
        request = decoding.make_request(model.cfg, rows, decode, eos=eos)
        result = drafters.generate(params, request, decode)
        write.calls += result.steps
        each = zip(result.tokens[:, 0].tolist(), result.lengths[:, 0].tolist(), strict=True)
        return [cut(ids[:length], () if case.forced else model.stops) for ids, length in each]

    write.calls = 0
    return write


def ctranslate2(case: Case, compute_type: str, threads: int) -> Write:
    """CTranslate2, with greedy search."""
    import ctranslate2 as library
    from transformers import AutoTokenizer

    converted = case.folder.parent / f"{case.folder.name}-ct2"
    if not converted.exists():
        converter = library.converters.TransformersConverter(str(case.folder))
        converter.convert(str(converted), quantization="float16" if case.half else None)
    tokenizer = AutoTokenizer.from_pretrained(case.folder)
    how = {"compute_type": compute_type, "intra_threads": threads, "inter_threads": 1}
    least = case.length if case.forced else 0
    back = tokenizer.convert_tokens_to_ids
    if case.pair:
        model = library.Translator(str(converted), **how)
        lengths = {"max_decoding_length": case.length, "min_decoding_length": least}

        def write(rows: Sequence[Ids]) -> list[Ids]:
            read = [tokenizer.convert_ids_to_tokens(row) for row in rows]
            found = model.translate_batch(read, beam_size=1, **lengths)
            return [back(each.hypotheses[0]) for each in found]

        return write
    model = library.Generator(str(converted), **how)
    lengths = {"max_length": case.length, "min_length": least}

    def write(rows: Sequence[Ids]) -> list[Ids]:
        read = [tokenizer.convert_ids_to_tokens(row) for row in rows]
        found = model.generate_batch(read, include_prompt_in_result=False, **lengths)
        return [back(each.sequences[0]) for each in found]

    return write


def llama_cpp(case: Case, stops: Sequence[int], threads: int, float32: bool) -> Write:
    """llama.cpp, one row after the other, with the file's own bits or with what they stand for."""
    import ctypes

    import llama_cpp as library

    file = case.gguf
    if float32:
        file = case.folder.parent / f"{case.gguf.stem}-float32.gguf"
        if not file.exists():
            how = library.llama_model_quantize_default_params()
            how.ftype, how.allow_requantize = library.LLAMA_FTYPE_ALL_F32, True
            names = (str(path).encode() for path in (case.gguf, file))
            library.llama_model_quantize(*names, ctypes.byref(how))
    slots = max(map(len, case.rows)) + case.length
    both = {"n_threads": threads, "n_threads_batch": threads}
    model = library.Llama(str(file), n_ctx=slots, n_batch=slots, **both, verbose=False)

    def one(row: Ids) -> Ids:
        # Otherwise the prompt that is still in its cache would cost nothing the second time.
        model.reset()
        tokens = model.generate(row, temp=0.0, top_k=1)
        return cut([token for token, _ in zip(tokens, range(case.length), strict=False)], stops)

    return lambda rows: [one(row) for row in rows]


def transformers(case: Case, stops: Sequence[int], threads: int, **options: Any) -> Write:
    """generate() of transformers; options are its own, such as prompt_lookup_num_tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    torch.set_num_threads(threads)
    kind = AutoModelForSeq2SeqLM if case.pair else AutoModelForCausalLM
    model = kind.from_pretrained(case.folder, dtype=torch.float32).eval()
    least = {"min_new_tokens": case.length} if case.forced else {}
    how = {"max_new_tokens": case.length, "do_sample": False, "num_beams": 1, "pad_token_id": 0}

    def write(rows: Sequence[Ids]) -> list[Ids]:
        width = max(map(len, rows))
        # A decoder goes on at the end of its prompts: they are padded on the left.
        padded, seen = np.zeros((2, len(rows), width), np.int64)
        for row, ids in enumerate(rows):
            place = slice(len(ids)) if case.pair else slice(width - len(ids), width)
            padded[row, place], seen[row, place] = ids, 1
        given = {"attention_mask": torch.tensor(seen), **how, **least, **options}
        with torch.inference_mode():
            found = model.generate(torch.tensor(padded), **given)
        begins = 1 if case.pair else width
        return [cut(row[begins:].tolist(), () if case.forced else stops) for row in found]

    return write
