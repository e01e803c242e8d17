# SPDX-License-Identifier: Apache-2.0
"""Loss and memory of a model whose keys and values are quantized or compressed (Decode.kv_cache).

Scores the first tokens of two texts that every Python has, one of code and one of prose, as
decoding in blocks of 64 would: every token attends to keys and values that were kept. Writes the
loss in nats per token, the share of tokens whose best next token is that of the cache in float32,
and the bytes of the cache's arrays for each token of a row.

  python benchmarks/kv_cache.py --checkpoint=SmolLM2-135M-Instruct.Q4_1.gguf [--tokens=2048]
      [--kinds auto int8 int8:int4 int4] [--json benchmarks/results/kv_cache.json]
"""

import argparse
import functools
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import report

PACKAGES = ["jax", "jaxlib", "flax"]
KINDS = ["auto", "int8", "int8:int4", "int4"]
BLOCK = 64
TEXTS = {"code (argparse.py)": "argparse", "prose (pydoc_data/topics.py)": "pydoc_data.topics"}


def read_ids(predictor: Any, tokens: int) -> dict[str, Any]:
    """The first tokens of each text, by name."""
    texts = {
        name: Path(import_module(module).__file__ or "").read_text(encoding="utf-8")
        for name, module in TEXTS.items()
    }
    return {
        name: predictor.encode_inputs([text[: 8 * tokens]])[0][:tokens]
        for name, text in texts.items()
    }


def score(cfg: Any, params: Any, kind: str, ids: Any) -> Any:
    """Log-probability [b t] of every token after the first, and the best token of every place.

    Args:
      cfg: config of the model.
      params: weights, prepared for decoding.
      kind: as Decode.kv_cache.
      ids: [b t] token ids.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from t5x_lite import model
    from t5x_lite.config.kv_cache import parse_kv_cache
    from t5x_lite.decoding.sampling import gather_vocabulary
    from t5x_lite.decoding.verification import token_log_probability

    form = parse_kv_cache(kind)._replace(block=BLOCK)
    transformer = model.Transformer(cfg, scan=False)

    @functools.partial(jax.jit, donate_argnums=1)
    def run(params, cache, tokens, following, start):
        apply = functools.partial(transformer.apply, {"params": params})
        block = model.TokenBlock(tokens, jnp.full(len(tokens), start))
        hidden, cache = apply(block, cache, method=model.Transformer.decode)
        logits = gather_vocabulary(apply(hidden, method=model.Transformer.logits))
        return cache, token_log_probability(logits, following), jnp.argmax(logits, axis=-1)

    cache = model.empty_cache(cfg, *ids.shape, scan=False, form=form)
    following, scores, chosen = np.roll(ids, -1, axis=1), [], []
    for start in range(0, ids.shape[1], BLOCK):
        block = slice(start, start + BLOCK)
        cache, *outputs = run(params, cache, ids[:, block], following[:, block], start)
        scores.append(outputs[0])
        chosen.append(outputs[1])
    # Nothing follows the last token.
    return np.concatenate(scores, axis=1)[:, :-1], np.concatenate(chosen, axis=1)


def cache_bytes(cfg: Any, kind: str, tokens: int) -> float:
    """Bytes of a cache's arrays for each of so many tokens of a row."""
    import jax

    from t5x_lite import model
    from t5x_lite.config.kv_cache import parse_kv_cache

    form = parse_kv_cache(kind)._replace(block=BLOCK)
    create = functools.partial(model.empty_cache, cfg, 1, tokens, scan=False, form=form)
    leaves = jax.tree.leaves(jax.eval_shape(create))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / tokens


def measure(options: argparse.Namespace) -> list[report.Row]:
    """Rows of every kind of cache; the others are compared with the first."""
    import jax
    import numpy as np

    from t5x_lite import interactive
    from t5x_lite.model.computation import with_dtype_of

    predictor, rows, best = interactive.load(options.checkpoint).predictor, [], None
    params = predictor.params
    cfg = with_dtype_of(predictor.cfg, params)
    texts = read_ids(predictor, options.tokens)
    for kind in options.kinds:
        scores, chosen = score(cfg, params, kind, np.array([*texts.values()], np.int32))
        best = chosen if best is None else best
        size = cache_bytes(cfg, kind, options.tokens)
        rows.append(report.Row("a token of a row", kind, "bytes", size))
        for name, row, ours, theirs in zip(texts, scores, chosen, best, strict=True):
            case = f"{name}, {options.tokens:,} tokens"
            rows += [
                report.Row(case, kind, "nats per token", round(float(-row.mean()), 5)),
                report.Row(case, kind, "same best token", round(float((ours == theirs).mean()), 4)),
            ]
        if options.json:
            report.write(options.json, rows, PACKAGES)
        print(f"{kind} is measured", file=sys.stderr, flush=True)
        jax.clear_caches()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, metavar="FILE")
    parser.add_argument("--kinds", nargs="+", default=KINDS)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--json", metavar="FILE")
    print(report.table(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
