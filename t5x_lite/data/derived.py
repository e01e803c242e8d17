# SPDX-License-Identifier: Apache-2.0
"""Parts of a run that its files leave out: commits of models of the hub, Model.vocab, the model."""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from t5x_lite import config
from t5x_lite.config import gin_file, run_sources
from t5x_lite.config.checked import MOST_TOKENS
from t5x_lite.config.training_run import RunT
from t5x_lite.data.datasets import open_vocabularies
from t5x_lite.data.label_names import find_labels, lacks_labels, with_readout
from t5x_lite.tokenizers.labels import largest_id_count
from t5x_lite.utils import hub, hub_names
from t5x_lite.utils.hub_errors import HubError, HubUnreachable
from t5x_lite.utils.hub_names import HubName
from t5x_lite.utils.not_none import not_none
from t5x_lite.utils.paths import parse_path

# In place of Model.vocab where nothing binds it.
UNBOUND = MOST_TOKENS
# A size that TPUs compute well, and that a mesh can split.
MULTIPLE = 128
# In place of a model that the checkpoint decides. Many heads, so that any kv_heads divide them.
PLACEHOLDER = """\
config.Model.encoder = @encoder/config.Stack()
config.Model.decoder = @decoder/config.Stack()
config.Stack.layers = 1000
config.Stack.embed = 2
config.Stack.heads = 720720
config.Stack.head_dim = 2
config.Stack.mlp = 2
""".splitlines()
# Fields that decide how a model trains or where it computes, and not what its weights are.
FREE = {
    *("dropout", "dtype", "attention", "embedding_std", "bias_std", "draft_heads", "readout"),
    "canvas",
    "shared_weights",
    "causal",
}


def load_run(paths: str | Sequence[str], bindings: Sequence[str] = ()) -> config.Run:
    """Reads a run as `gin_file.load_run` does, with what follows from other files.

    A model of the hub is named with its commit. Model.vocab need not be bound: it is then the size
    of the vocabulary, rounded up to a multiple of 128. Of a run that begins with a checkpoint
    (Checkpoint.initial), the whole model need not be: it is the checkpoint's. A run that goes on
    keeps what its MODEL_DIR has.

    Args:
      paths: .gin file, or several that are read one after the other.
      bindings: bindings on top, such as "TRAIN_STEPS=100".

    Raises:
      ValueError: the config cannot be used, or a checkpoint or vocabulary cannot be opened.
    """
    try:
        bound = gin_file.bound_fields(paths, bindings)
    except gin_file.ConfigError:
        bound = {}  # below, the message names the files
    fields = {(owner, name) for _, owner, name in bound}
    defaults = [f"config.Model.vocab = {UNBOUND}"]
    whole = bool({("Model", "encoder"), ("Model", "decoder")} & fields)
    has_initial = ("Checkpoint", "initial") in fields
    if not whole and has_initial:
        run = gin_file.load_run(paths, bindings, defaults=[*defaults, *PLACEHOLDER])
        if run.checkpoint.initial is not None:
            return complete_labels(derive_model(pin_sources(run), bound))
    run = pin_sources(gin_file.load_run(paths, bindings, defaults=defaults))
    return complete_vocabulary(complete_labels(run))


def complete_labels(run: config.Run) -> config.Run:
    """The run with the labels of Model.readout: those that are bound, of MODEL_DIR, or
    else of the training data."""
    if lacks_labels(run):
        readout, saved = not_none(run.model.readout), saved_model(run)
        former = None if saved is None else saved.readout
        if former is not None and former.kind == readout.kind:
            labels = former.labels
        else:
            config.require(
                run.data is not None,
                "Readout.labels is empty, and the run has no data with labels: bind their names",
            )
            labels = find_labels(not_none(run.data), readout)
        run = with_model(run, readout=dataclasses.replace(readout, labels=labels))
    return with_readout(run)


def complete_vocabulary(run: config.Run) -> config.Run:
    """The run with the size of its vocabulary as Model.vocab, where nothing binds it."""
    if run.model.vocab != UNBOUND:
        return run
    saved = saved_model(run)
    if saved is not None:
        return with_model(run, vocab=saved.vocab)
    config.require(
        run.data is not None,
        "config.Model is not complete: bind vocab. The run has no data with a vocabulary",
    )
    size = largest_id_count(open_vocabularies(not_none(run.data)))
    return with_model(run, vocab=-(-size // MULTIPLE) * MULTIPLE)


def with_model(run: RunT, **fields) -> RunT:
    """The run with other fields of its model."""
    return dataclasses.replace(run, model=dataclasses.replace(run.model, **fields))


def saved_run(run: config.Run) -> config.Run | None:
    """The config of the checkpoints in MODEL_DIR; None without any."""
    folder = parse_path(run.model_dir)
    if not (folder / "config.gin").is_file() or not any(folder.glob("checkpoints/[0-9]*")):
        return None
    try:
        return gin_file.from_text((folder / "config.gin").read_text(encoding="utf-8"))
    except ValueError:  # `model_dir.check_config` reports it
        return None


def saved_model(run: config.Run) -> config.Model | None:
    """The model of the checkpoints in MODEL_DIR; None without any."""
    saved = saved_run(run)
    return None if saved is None else saved.model


def pin_sources(run: config.Run) -> config.Run:
    """The run with a commit in the name of every model of the hub, so that its text reads the same
    weights on any day. A run that goes on keeps the commits of its MODEL_DIR.

    Raises:
      HubError: there is no such model, or neither the hub nor its cache can be read.
    """
    saved: dict[str, str] | None = None
    pinned: dict[str, str] = {}

    def pin(place: str, text: str) -> str:
        nonlocal saved
        name = hub_names.parse_source(text)
        if isinstance(name, Path) or name.is_pinned:
            return text
        if saved is None:
            before = saved_run(run)
            saved = {} if before is None else run_sources.list_sources(before)
        former = saved.get(place)
        if former is not None and is_commit_of(former, name):
            if name.revision is not None:
                print(f"{text}: MODEL_DIR has {former}, which is read", file=sys.stderr)
            return former
        if text not in pinned:
            pinned[text] = agree_on_commit(text)
        return pinned[text]

    return run_sources.map_sources(run, pin)


def is_commit_of(source: str, name: HubName) -> bool:
    """True if a source is a commit of the model that a name without a commit names."""
    other = hub_names.parse_source(source)
    same = not isinstance(other, Path) and (other.repo, other.file) == (name.repo, name.file)
    return same and not isinstance(other, Path) and other.is_pinned


def agree_on_commit(text: str) -> str:
    """`hub.pin_source`, with the answer that the first process of a run gets: a branch may move
    between two requests."""
    from t5x_lite import processes

    answer, kinds = {}, {each.__name__: each for each in (HubError, HubUnreachable)}
    if processes.is_first():
        try:
            answer = {"source": hub.pin_source(text)}
        except HubError as error:
            answer = {"error": str(error), "kind": type(error).__name__}
    answer = json.loads(processes.broadcast_text(json.dumps(answer)))
    if "error" in answer:
        raise kinds[answer["kind"]](answer["error"])
    return answer["source"]


def derive_model(run: config.Run, bound: Mapping[tuple[str, str, str], str]) -> config.Run:
    """The run with the model of its MODEL_DIR, or else of Checkpoint.initial.

    Args:
      run: a run with a placeholder for its model.
      bound: fields that the config binds, as `gin_file.bound_fields` lists them.

    Raises:
      ValueError: the checkpoint cannot be opened, or a bound field contradicts it.
    """
    saved, initial = saved_model(run), not_none(run.checkpoint.initial)
    model = open_model(initial) if saved is None else saved
    changes = bound_values(run.model, model, "Model", "", bound)
    for name in ("encoder", "decoder"):
        stack, placeholder = getattr(model, name), getattr(run.model, name)
        if stack is not None:
            fields = bound_values(placeholder, stack, "Stack", name, bound)
            changes[name] = dataclasses.replace(stack, **fields)
    if saved is None:
        check_bound(model, changes, initial, bound)
    return dataclasses.replace(run, model=dataclasses.replace(model, **changes))


def open_model(source: str) -> config.Model:
    """The model of a checkpoint, of which no weight is read."""
    from t5x_lite.checkpoints.opening import open_described

    remedy = "include the file of configs/models that describes it"
    return open_described("Checkpoint.initial", source, remedy, text=True).model


def bound_values(
    bound_part: Any,
    part: Any,
    owner: str,
    scope: str,
    bound: Mapping[tuple[str, str, str], str],
) -> dict[str, Any]:
    """Values of the fields that a config binds, of a model or of a stack.

    Args:
      bound_part: the model or stack as the config has it.
      part: the one that it is to change.
      owner: its class.
      scope: the scope in which the config makes it.
      bound: as of `derive_model`.
    """
    names = {field for each, cls, field in bound if cls == owner and each in ("", scope)}
    fields = {field.name for field in dataclasses.fields(part)} & names
    return {name: getattr(bound_part, name) for name in sorted(fields)}


def check_bound(
    model: config.Model,
    changes: Mapping[str, Any],
    source: str,
    bound: Mapping[tuple[str, str, str], str],
) -> None:
    """Raises ValueError where a bound field contradicts a checkpoint.

    Args:
      model: model of the checkpoint.
      changes: fields of the model, and its changed stacks.
      source: the checkpoint.
      bound: as of `derive_model`.
    """
    for scope, part in (("", model), ("encoder", model.encoder), ("decoder", model.decoder)):
        changed = changes.get(scope, part) if scope else dataclasses.replace(model, **changes)
        owner = type(part).__name__
        for field in dataclasses.fields(part) if part is not None else ():
            values = getattr(part, field.name), getattr(changed, field.name)
            if field.name in (*FREE, "encoder", "decoder") or values[0] == values[1]:
                continue
            places = [bound.get((each, owner, field.name)) for each in (scope, "")]
            place = next(filter(None, places), "the config")
            whose = f"the {scope} of {source}" if scope else source
            raise ValueError(
                f"{place}: config.{owner}.{field.name} is {values[1]!r}, but {whose} has "
                f"{values[0]!r}: leave the binding out"
            )
