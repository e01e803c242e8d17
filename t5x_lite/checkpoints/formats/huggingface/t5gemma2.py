# SPDX-License-Identifier: Apache-2.0
"""The text part of T5Gemma 2 (Gemma 3 blocks, merged attention), as Hugging Face names it.

In files the encoder's weights begin with model.encoder; in transformers 5's memory they begin with
model.encoder.text_model. The vision tower and its projector are left out both ways; transformers
always builds one, so an export describes the smallest there is.
"""

from collections.abc import Collection

from t5x_lite import config
from t5x_lite.checkpoints.formats.huggingface import fields, t5gemma
from t5x_lite.checkpoints.transforms import Entry
from t5x_lite.utils.not_none import not_none

DEFAULTS = t5gemma.DEFAULTS | dict(
    vocab_size=262208, final_logit_softcapping=None, attn_logit_softcapping=None
)
TABLE = "model.encoder.embed_tokens"
SMALLEST_VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 2,
    "intermediate_size": 2,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 2,
    "patch_size": 2,
}


def parse_config(config_json: dict, names: Collection[str]) -> config.Model:
    """The Model of a T5Gemma 2 with this config.json, whose files have tensors of these names."""
    encoder = DEFAULTS | config_json["encoder"]["text_config"]
    decoder = DEFAULTS | config_json["decoder"]
    tied = config_json.get("tie_word_embeddings", True)
    eoi = config_json["encoder"].get("eoi_token_index", 256000)
    return config.Model(
        vocab=decoder["vocab_size"],
        encoder=config.Stack(**tower_fields(encoder), window_form="halved"),
        decoder=config.Stack(**tower_fields(decoder), merged=True),
        tied=tied and "lm_head.out_proj.weight" not in names,
        logits_softcap=decoder["final_logit_softcapping"],
        scale_embedding=True,
        # An id that the vocabulary does not reach never occurs.
        eoi=eoi if eoi < decoder["vocab_size"] else None,
        decoder_start_token_id=decoder["bos_token_id"],
        dropout=config_json.get("dropout_rate", 0.0),
    )


def tower_fields(tower: dict) -> dict:
    """Fields of the Stack that one of config.json's two towers describes."""
    fields.warn_softcap(tower, "T5Gemma 2")
    # transformers 5.23 has this field and does not use it.
    fields.choose_value(tower, "use_bidirectional_attention", {False: None}, default=False)
    cycle = tower.get("sliding_window_pattern", tower.get("_sliding_window_pattern", 6))
    kinds = tower["layer_types"] or fields.alternate_layer_types(tower["num_hidden_layers"], cycle)
    pattern = fields.shortest_pattern(kinds)
    return (
        t5gemma.gemma_stack_fields(tower)
        | rotary_fields(tower)
        | dict(
            qk_norm=True,
            pattern=pattern,
            window=tower["sliding_window"] if "sliding" in pattern else None,
        )
    )


def rotary_fields(tower: dict) -> dict:
    """Both rotary bases, and the scaling of positions in full layers.

    The older form has rope_theta, rope_local_base_freq and rope_scaling (of the full layers).
    """
    rope = tower.get("rope_parameters") or {}
    full = {"rope_theta": tower.get("rope_theta", 1e6)} | (tower.get("rope_scaling") or {})
    full |= rope.get("full_attention") or {}
    sliding = {"rope_theta": tower.get("rope_local_base_freq", 1e4)}
    sliding |= rope.get("sliding_attention") or {}
    kind = fields.choose_value(
        {"rope_type": full.get("rope_type", full.get("type", "default"))},
        "rope_type",
        {"default": None, "linear": "linear"},
    )
    fields.choose_value(sliding, "rope_type", {"default": None}, default="default")
    return dict(
        rotary_base=float(full["rope_theta"]),
        sliding_rotary_base=float(sliding["rope_theta"]),
        rotary_scaling=config.RotaryScaling(kind, float(full["factor"])) if kind else None,
    )


def canonical_name(name: str) -> str:
    """The name that a tensor has in the table, of the one that transformers has in memory."""
    return name.replace("model.encoder.text_model.", "model.encoder.")


def entries(cfg: config.Model) -> list[Entry]:
    """Table of the text part."""
    table = [Entry("embedding", f"{TABLE}.weight", "vocab embed")]
    if cfg.eoi is not None:
        table.append(Entry("eoi_embedding", f"{TABLE}.eoi_embedding", "norm"))
    if not cfg.tied:
        table.append(Entry("head", "lm_head.out_proj.weight", "vocab embed"))
    table += t5gemma.tower_entries("encoder", "model.encoder", not_none(cfg.encoder))
    return table + t5gemma.tower_entries("decoder", "model.decoder", not_none(cfg.decoder))


def ignored(cfg: config.Model) -> tuple[str, ...]:
    """Tensors of vision, and the end of an image where the vocabulary does not reach it."""
    vision = ("model.encoder.vision_tower.*", "model.encoder.multi_modal_projector.*")
    return vision + (("*.eoi_embedding",) if cfg.eoi is None else ())


def duplicates(cfg: config.Model) -> dict[str, str]:
    """The decoder's and the head's copies of the one table."""
    copies = {"model.decoder.embed_tokens.weight": f"{TABLE}.weight"}
    if cfg.tied:
        copies["lm_head.out_proj.weight"] = f"{TABLE}.weight"
    if cfg.eoi is not None:
        copies["model.decoder.embed_tokens.eoi_embedding"] = f"{TABLE}.eoi_embedding"
    return copies


def config_json(cfg: config.Model) -> dict:
    """config.json of cfg; raises ValueError, naming the field, where T5Gemma 2 cannot say it."""
    encoder, decoder = cfg.encoder, cfg.decoder
    if encoder is None or decoder is None:
        raise ValueError("T5Gemma 2 cannot express a Model without both encoder and decoder")
    if cfg.eoi is None:
        raise ValueError("T5Gemma 2 always has an end of an image: bind Model.eoi to its id")
    wanted = dict(scale_logits=False, scale_embedding=True, separate_embeddings=False)
    fields.require_values(cfg, "T5Gemma 2", logits_bias=False, **wanted)
    fields.require_values(decoder, "T5Gemma 2", merged=True)
    if encoder.window is not None:
        fields.require_values(encoder, "T5Gemma 2", window_form="halved")
    text = tower_config(cfg, encoder) | {"model_type": "t5gemma2_text"}
    return {
        "model_type": "t5gemma2",
        "architectures": ["T5Gemma2ForConditionalGeneration"],
        "is_encoder_decoder": True,
        "encoder": {
            "model_type": "t5gemma2_encoder",
            "text_config": text,
            "vision_config": SMALLEST_VISION,
            "mm_tokens_per_image": 1,
            "eoi_token_index": cfg.eoi,
        },
        "decoder": tower_config(cfg, decoder) | {"model_type": "t5gemma2_decoder"},
        "eoi_token_index": cfg.eoi,
        "tie_word_embeddings": cfg.tied,
        "dropout_rate": cfg.dropout,
        "vocab_size": cfg.vocab,
        "bos_token_id": cfg.decoder_start_token_id,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


def tower_config(cfg: config.Model, stack: config.Stack) -> dict:
    """One tower as transformers' T5Gemma2TextConfig."""
    fields.require_values(stack, "T5Gemma 2", qk_norm=True, softcap=None)
    full = {"rope_type": "default", "rope_theta": stack.rotary_base}
    if stack.rotary_scaling is not None:
        if stack.rotary_scaling.kind != "linear":
            raise ValueError("T5Gemma 2 cannot express RotaryScaling.kind other than linear")
        full |= {"rope_type": "linear", "factor": stack.rotary_scaling.factor}
    base = stack.sliding_rotary_base or stack.rotary_base
    return t5gemma.shared_tower_config(cfg, stack, "T5Gemma 2") | {
        "rope_parameters": {
            "full_attention": full,
            "sliding_attention": {"rope_type": "default", "rope_theta": base},
        },
        "attn_logit_softcapping": None,
    }
