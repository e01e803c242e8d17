# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of BART, Marian, M2M100, NLLB, mBART-50 and Pegasus, trained on a few sentences."""

import io
import json
import random

from test_tokenizers import SENTENCES

from t5x_lite.tokenizers import renumbered

WORDS = " ".join(SENTENCES).split() + ["①", "ﬁne", "zzz", "жук", "ß", "12,5", "—", "𝕳", "x_y"]
draw = random.Random(4)
LINES = [" ".join(draw.choices(WORDS, k=draw.randint(1, 12))) for _ in range(1000)]


def train(kind="unigram", size=110, corpus=None, **options):
    """A SentencePiece model as fairseq and Marian train it: <unk> 0, <s> 1, </s> 2.

    Args:
      kind: "unigram" or "bpe".
      size: number of pieces.
      corpus: lines; None for SENTENCES.
      **options: of the trainer.
    """
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus or SENTENCES),
        model_writer=model,
        model_type=kind,
        vocab_size=size,
        character_coverage=0.98,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return model.getvalue() if kind == "bpe" else without_ties(model.getvalue())


def without_ties(content):
    """The model with other scores: versions choose differently among equal segmentations."""
    proto, jitter = renumbered.parse_proto(content), random.Random(1)
    for piece in proto.pieces:
        if piece.type == piece.NORMAL:
            piece.score -= jitter.uniform(0, 0.5)
    return proto.SerializeToString()


def pieces_of(model):
    return [piece.piece for piece in renumbered.parse_proto(model).pieces]


def write(folder, files, model_type, **settings):
    """Writes a folder with files and settings of a tokenizer, of a model_type."""
    content = {"config.json": {"model_type": model_type, "decoder_start_token_id": 0}}
    content |= {"tokenizer_config.json": settings}
    for name, value in (files | content).items():
        value = value if isinstance(value, bytes) else json.dumps(value).encode()
        (folder / name).write_bytes(value)


def bart(folder):
    import tokenizers

    tokenizer = tokenizers.ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer.train_from_iterator(SENTENCES, vocab_size=400, special_tokens=special)
    tokenizer.save_model(str(folder))
    write(folder, {}, "bart", tokenizer_class="BartTokenizer")


def marian(folder):
    """Two models of unlike texts; vocab.json has most pieces of both, and languages."""
    source, target = train(), train(size=90, corpus=SENTENCES[::-1][:3] * 20 + ["más ñandú"] * 9)
    pieces = dict.fromkeys([*pieces_of(source)[3:-9], *pieces_of(target)[3:-4], ">>fra<<"])
    names = ["</s>", "<unk>", *(name for name in pieces if name != "s"), "<pad>"]
    files = {"source.spm": source, "target.spm": target}
    files |= {"vocab.json": {name: token for token, name in enumerate(names)}}
    write(folder, files, "marian", tokenizer_class="MarianTokenizer")


def m2m100(folder):
    model = train("bpe", 120)
    names = ["<s>", "<pad>", "</s>", "<unk>", *pieces_of(model)[3:-5]]
    files = {"sentencepiece.bpe.model": model}
    files |= {"vocab.json": {name: token for token, name in enumerate(names)}}
    from transformers.models.m2m_100 import tokenization_m2m_100

    codes = tokenization_m2m_100.FAIRSEQ_LANGUAGE_CODES["m2m100"]
    languages = [f"__{code}__" for code in codes]
    write(
        folder,
        files,
        "m2m_100",
        tokenizer_class="M2M100Tokenizer",
        src_lang="fr",
        additional_special_tokens=languages,
    )


def mbart50(folder):
    from transformers.models.mbart50 import tokenization_mbart50

    codes = tokenization_mbart50.FAIRSEQ_LANGUAGE_CODES
    write(
        folder,
        {"sentencepiece.bpe.model": train()},
        "mbart",
        tokenizer_class="MBart50Tokenizer",
        src_lang="ro_RO",
        additional_special_tokens=codes,
    )


def nllb(folder):
    from transformers import NllbTokenizer

    languages = ["deu_Latn", "eng_Latn", "zul_Latn"]
    settings = dict(tokenizer_class="NllbTokenizer", additional_special_tokens=languages)
    write(folder, {"sentencepiece.bpe.model": train("bpe", 120)}, "m2m_100", **settings)
    # Released ones have a tokenizer.json.
    NllbTokenizer.from_pretrained(folder, src_lang="zul_Latn").save_pretrained(folder)


def pegasus(folder):
    model = train(pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    write(folder, {"spiece.model": model}, "pegasus", tokenizer_class="PegasusTokenizer")


FOLDERS = {each.__name__: each for each in (bart, marian, m2m100, mbart50, nllb, pegasus)}


def write_translator(name, folder):
    """Writes a folder with one of these tokenizers and a tiny model of its family; returns it.

    Args:
      name: key of FOLDERS.
      folder: an empty folder.
    """
    import torch
    import transformers
    from parity import shaken

    kinds = {
        "bart": transformers.BartForConditionalGeneration,
        "marian": transformers.MarianMTModel,
        "mbart50": transformers.MBartForConditionalGeneration,
        "pegasus": transformers.PegasusForConditionalGeneration,
    }
    kind = kinds.get(name, transformers.M2M100ForConditionalGeneration)
    FOLDERS[name](folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    # Those of M2M100 say that ids without a piece follow.
    size = len(tokenizer) + 8 * (name == "m2m100")
    fields = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=8)
    fields |= dict(encoder_attention_heads=2, decoder_attention_heads=2, decoder_ffn_dim=8)
    ends = tokenizer.pad_token_id, tokenizer.eos_token_id
    starts = {"marian": ends[0], "pegasus": ends[0]}
    described = kind.config_class(
        **fields,
        vocab_size=size,
        dropout=0.0,
        pad_token_id=ends[0],
        eos_token_id=ends[1],
        decoder_start_token_id=starts.get(name, ends[1]),
        forced_eos_token_id=None,
    )
    theirs = shaken(kind._from_config(described, dtype=torch.float32), 4)
    with torch.no_grad():
        # Otherwise the bias of the last norm, or the last token, would decide what follows.
        for each, weight in theirs.named_parameters():
            if each.endswith("norm.bias"):
                weight.zero_()
            elif weight.ndim == 1 and "norm" not in each:
                weight.mul_(0.1)
            elif weight.ndim == 2 and "embed" not in each and "shared" not in each:
                weight.mul_(3)
        theirs.get_input_embeddings().weight.mul_(0.1)
        # As transformers trains it: the embedding of padding is zero.
        theirs.get_input_embeddings().weight[ends[0]] = 0
    theirs.save_pretrained(folder)
    return theirs
