# SPDX-License-Identifier: Apache-2.0
"""Eight virtual CPU devices for every test, and the meshes and toy models that rooms share."""

import collections
import contextlib
import dataclasses
import gc
import hashlib
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    # On a busy machine eight threads can take more than the 40 s that XLA waits for them.
    " --xla_cpu_collective_call_terminate_timeout_seconds=600"
    # Toys are compiled far longer than they run: without LLVM's costly passes, 2.5 times less.
    " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    # Two workers share the cores: in 32 parts, for as many threads, a program takes 10 % longer.
    " --xla_cpu_parallel_codegen_split_count=1"
)
# XLA runs the eight devices and their parts on as many threads as there are cores, at least eight,
# and the devices block theirs while they wait for each other: on a busy machine nothing is left for
# the part that all wait for (aborted in 4 of 6 runs; with 32 threads in none of 10).
os.environ.setdefault("NPROC", "32")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# libtpu compiles without a chip if it asks no metadata server; read when jax is imported.
if "tpu" not in os.environ["JAX_PLATFORMS"]:
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
# Compiling is more than half of the suite's time. Programs are kept from run to run, under a key
# that covers jaxlib, flags and processor, and shared by workers and the commands that tests start.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    os.path.join(
        os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"), "t5x_lite", "tests"
    ),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Tolerances are those of float32, whatever this processor is fastest in.
os.environ.setdefault("T5X_LITE_CPU_DTYPE", "float32")
# A shell's background jobs ignore Ctrl-C, those of nohup a hangup too, and the commands that tests
# start would inherit it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

import jax
import numpy as np
import pytest

from t5x_lite import config
from t5x_lite.batch import Batch

KEEP_DAYS = 14
# Flags for commands that tests start, which have one device each.
COMPILE_QUICKLY = " ".join(
    flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag
)


def pytest_sessionstart(session):
    """Drops old programs, once, and spares the modules from the garbage collector (4 % of time)."""
    cache = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    if not hasattr(session.config, "workerinput") and cache.is_dir():
        oldest = time.time() - KEEP_DAYS * 24 * 3600
        for path in cache.glob("*-cache"):
            if path.stat().st_mtime < oldest:
                path.unlink(missing_ok=True)
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_itemcollected(item):
    """Marks what is exhaustive slow, too: -m "not slow" is without both."""
    if item.get_closest_marker("exhaustive"):
        item.add_marker("slow")


def pytest_collection_modifyitems(items):
    """Begins with the files that have most slow tests, so that none of them is left at the end."""
    slow = collections.Counter(
        item.path
        for item in items
        if item.get_closest_marker("slow") and not item.get_closest_marker("exhaustive")
    )
    items.sort(key=lambda item: (-slow[item.path], item.path))


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_file():
    """Clears compiled programs after each file: a process would grow to 10 GB over the suite."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def without_the_mesh_of_others(request):
    """Tests of kernels take arrays of no mesh; those of whole models set one and leave it set."""
    of_kernels = ("test_attention", "test_kernels", "test_tpu_kernels", "test_tune")
    if not request.module.__name__.startswith(of_kernels):
        yield
        return
    with jax.set_mesh(None):
        yield


def mark_exhaustive(cases: Iterable, kept: Iterable) -> list:
    """Cases of parametrize, of which all but some are run before a release alone.

    Args:
      cases: values, or tuples of several.
      kept: those of the cases that every run has.
    """
    rows = [(case, case if isinstance(case, tuple) else (case,)) for case in cases]
    kept = list(kept)
    assert all(any(case == one for case, _ in rows) for one in kept), kept
    return [
        pytest.param(*row, marks=() if case in kept else pytest.mark.exhaustive)
        for case, row in rows
    ]


def toy_stack(**changes) -> config.Stack:
    """A small stack; changes are its fields."""
    fields = dict(layers=2, embed=16, heads=4, head_dim=8, mlp=32) | changes
    return config.Stack(**fields)


# What the families combine, beside the T5 and the GPT that toy_model makes of these.
GEMMA = dict(
    norm="rms_plus_one",
    post_norms=True,
    positions="rotary",
    kv_heads=2,
    pattern=("sliding", "full"),
    tied=True,
    scale_embedding=True,
    embedding_std=0.25,
)
BIASED = dict(
    norm="layer",
    gated=False,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    tied=True,
    embedding_std=0.25,
)
FAMILIES = {
    "t5gemma": dict(
        GEMMA,
        softcap=5.0,
        window=3,
        logits_softcap=3.0,
        separate_embeddings=True,
    ),
    "t5gemma2": dict(
        GEMMA,
        merged=True,
        qk_norm=True,
        window=4,
        window_form="halved",
        sliding_rotary_base=100.0,
        rotary_scaling=config.RotaryScaling("linear", 2.0),
        eoi=7,
    ),
    "umt5": dict(bias_per_layer=True),
    "gpt2": dict(BIASED, positions="learned", max_length=16),
    "bart": dict(
        BIASED,
        norm_order="post",
        embedding_norm=True,
        positions="learned",
        max_length=48,
        position_offset=2,
        activation="gelu_exact",
        logits_bias=True,
        decoder_start_token_id=2,
    ),
    "m2m100": dict(
        BIASED,
        positions="sinusoidal",
        sinusoids="tensor2tensor",
        position_offset=2,
        activation="relu",
        scale_embedding=True,
        decoder_start_token_id=2,
    ),
    "mistral": dict(positions="rotary", pattern=("sliding",), window=3, kv_heads=2),
}


def toy_model(layout: str, prefix_lm: bool = False, **changes) -> config.Model:
    """A float32 model with a vocabulary of 64.

    Args:
      layout: "encoder_decoder", "decoder_only" or "encoder_only".
      prefix_lm: bidirectional prefix of a lone decoder.
      **changes: fields of `config.Stack` or `config.Model`.
    """
    of_model = {field.name for field in dataclasses.fields(config.Model)}
    stack = toy_stack(**{name: changes[name] for name in changes.keys() - of_model})
    cfg = config.Model(
        vocab=64,
        encoder=dataclasses.replace(stack, merged=False) if layout != "decoder_only" else None,
        decoder=stack if layout != "encoder_only" else None,
        prefix_lm=prefix_lm,
        dtype="float32",
    )
    return dataclasses.replace(cfg, **{name: changes[name] for name in changes.keys() & of_model})


def toy_batch(layout: str, rows: int = 8, length: int = 12, seed: int = 0) -> Batch:
    """Random rows of two packed examples and some padding, as numpy arrays.

    Args:
      layout: "encoder_decoder", "decoder_only" or "encoder_only".
      rows: number of rows.
      length: length of a row.
      seed: seed of the draw.
    """
    draw = np.random.default_rng(seed)

    def ids():
        return draw.integers(2, 64, (rows, length)).astype(np.int32)

    ends = draw.integers(4, length // 2, rows), draw.integers(length // 2 + 1, length, rows)
    place = np.arange(length)[None]
    second = place >= ends[0][:, None]
    used = place < ends[1][:, None]
    segments = np.where(used, 1 + second, 0).astype(np.int32)
    where = np.where(used, place - second * ends[0][:, None], 0).astype(np.int32)
    targets = (ids() * used, segments, where)
    weights = used.astype(np.float32)
    if layout != "decoder_only":
        return Batch(*targets, weights, ids() * used, segments, where)
    prefix = used & (where < 2)
    return Batch(*targets, weights * ~prefix, prefix=prefix)


@pytest.fixture(scope="session")
def open_once():
    """Opens the store of a scheme; the same one every time, as clients keep the address of it."""
    opened = {}

    def open_scheme(scheme):
        from stores import open_store

        if scheme not in opened:
            opened[scheme] = stack.enter_context(open_store(scheme))
        return opened[scheme]

    with contextlib.ExitStack() as stack:
        yield open_scheme


@pytest.fixture(scope="session", params=["s3", "gs"])
def shared_store(request, open_once):
    """A server that stands in for a store of objects, with the variables that lead to it."""
    pytest.importorskip({"s3": "s3fs", "gs": "gcsfs"}[request.param])
    from t5x_lite.utils import remote_paths

    each = open_once(request.param)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in each.environment().items():
            patch.setenv(name, value)
        remote_paths.prepare_stores.cache_clear()
        yield each
        patch.delenv("TENSORSTORE_GCS_HTTP_URL", raising=False)


@pytest.fixture
def store(shared_store, request):
    """The store of objects, with a folder of this test alone: tests share the server."""
    shared_store.folder = hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:12]
    return shared_store
