# SPDX-License-Identifier: Apache-2.0
"""Tasks of EleutherAI's lm-evaluation-harness (package lm_eval, extra `lm_eval`).

    python -m t5x_lite.evaluation.lm_harness run --model t5x_lite --tasks hellaswag \\
        --model_args checkpoint=runs/g2p,batch_size=64

is the harness's own command with this model added to its table.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from t5x_lite import config
from t5x_lite.checkpoints.opened_checkpoint import LoadedCheckpoint, OpenedCheckpoint
from t5x_lite.checkpoints.opening import open_checkpoint
from t5x_lite.config.checked import Count
from t5x_lite.evaluation.arguments import check_argument
from t5x_lite.evaluation.harness_model import MAX_LENGTH, HarnessModel, import_harness
from t5x_lite.evaluation.predict import Predictor, has_inputs

# Fields of config.json that say how many tokens a model reads, in the harness's order.
LENGTHS = ("n_positions", "max_position_embeddings", "n_ctx")
# Larger ones stand for a tokenizer without a limit.
NO_LIMIT = 10**20
# Arguments that the harness passes to every model and that have no meaning here.
UNUSED = ("device", "max_batch_size")


class NamedHarnessModel(HarnessModel):
    """A model that the harness loads by the checkpoint in its --model_args."""

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> HarnessModel:
        """Loads the checkpoint that --model_args names; the harness calls it.

        Raises:
          ValueError: an argument is unknown or of another type, or the checkpoint cannot be read.
        """
        arguments = {k: v for k, v in (additional_config or {}).items() if v is not None}
        arguments |= arg_dict
        if isinstance(size := arguments.get("batch_size"), str):
            # The command line passes text; "auto" leaves the choice to the model.
            arguments["batch_size"] = int(size) if size.isdigit() else None
        return load_harness_model(**arguments)

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: Mapping[str, Any] | None = None
    ) -> HarnessModel:
        """Loads the checkpoint that --model_args names as one text; raises ValueError as
        `create_from_arg_obj`."""
        arguments = import_harness("utils").simple_parse_args_string(arg_string)
        return cls.create_from_arg_obj(arguments, additional_config)


import_harness("api.registry").register_model("t5x_lite")(NamedHarnessModel)


def load_harness_model(checkpoint: str | Path = "", **arguments: Any) -> HarnessModel:
    """Loads a checkpoint for the harness.

    Args:
      checkpoint: a run or Hugging Face folder, a .gguf file, or a model of the hub.
      **arguments: step and quantize, as `interactive.load` takes them; batch_size, rows of a batch;
        max_length, tokens that the model reads.

    Raises:
      ValueError: an argument is unknown or of another type, or the checkpoint cannot be read.
    """
    known = ("step", "quantize", "batch_size", "max_length")
    unknown = sorted(arguments.keys() - {*known, *UNUSED})
    usage = f"it takes checkpoint=PATH, and {', '.join(known)}"
    config.require(not unknown, f"model_args has {', '.join(unknown)}: {usage}")
    config.require(bool(checkpoint), f"model_args names no checkpoint: {usage}")
    opened = open_checkpoint(str(checkpoint), arguments.get("step"))
    loaded = opened.load(None, arguments.get("quantize"))
    sizes = (arguments.get("batch_size"), arguments.get("max_length"))
    return make_harness_model(opened, loaded, *sizes)


def make_harness_model(
    opened: OpenedCheckpoint,
    loaded: LoadedCheckpoint,
    batch_size: int | None = None,
    max_length: int | None = None,
) -> HarnessModel:
    """A loaded checkpoint as the harness's LM.

    Args:
      opened: the checkpoint.
      loaded: its weights and vocabularies.
      batch_size: rows of a batch; None takes that of the run.
      max_length: tokens that the model reads; None takes what its files say.
    """
    run = loaded.run
    max_length = check_argument("max_length", max_length, Count | None)
    batch_size = check_argument("batch_size", batch_size, Count | None)
    predictor = Predictor(
        run.model,
        loaded.params,
        loaded.vocabularies,
        ended=has_inputs(run),
        batch_size=batch_size or run.evaluate.batch_size,
    )
    length = max_length or find_length(opened, loaded)
    return HarnessModel(predictor, run.decode, loaded.chat, length, str(opened.path))


def find_length(opened: OpenedCheckpoint, loaded: LoadedCheckpoint) -> int:
    """Tokens that a model reads: by its config.json, its positions or its tokenizer, or 2048."""
    kept = opened.kept.config
    fields = [part for part in (kept.get("text_config"), kept) if isinstance(part, dict)]
    named = [part[name] for part in fields for name in LENGTHS if isinstance(part.get(name), int)]
    stacks = [stack for stack in (opened.model.encoder, opened.model.decoder) if stack]
    learned = [stack.longest for stack in stacks if stack.longest is not None]
    origin = getattr(loaded.vocabularies[0], "origin", {}).get("model_max_length")
    tokenizer = [origin] if isinstance(origin, int) and origin < NO_LIMIT else []
    return min([[*named, *tokenizer, MAX_LENGTH][0], *learned])


def measure_tasks(
    model: HarnessModel,
    tasks: Sequence[str],
    few_shot: int | None = None,
    examples: int | None = None,
) -> dict[str, Any]:
    """Runs tasks of the harness; returns what `lm_eval.simple_evaluate` does.

    Args:
      model: the model.
      tasks: names of tasks, or their .yaml files.
      few_shot: examples before each question; None leaves it to the task.
      examples: the first examples of each task only; None for all.

    Raises:
      ValueError: there is no such task.
    """
    # The harness reads thousands of files to know its own tasks by name.
    named = [task for task in tasks if not task.endswith((".yaml", ".yml"))]
    manager = import_harness("tasks").TaskManager(include_defaults=bool(named))
    missing = [task for task in named if not manager.match_tasks([task])]
    missing += [task for task in tasks if task not in named and not Path(task).is_file()]
    config.require(
        not missing,
        f"--lm_eval: there is no task {', '.join(missing)}: name tasks that `lm_eval ls tasks` "
        "lists, or .yaml files",
    )
    results = import_harness("evaluator").simple_evaluate(
        model=model,
        tasks=list(tasks),
        num_fewshot=few_shot,
        limit=examples,
        task_manager=manager,
        bootstrap_iters=1000,
    )
    return results


def format_results(results: dict[str, Any]) -> str:
    """The harness's table of results."""
    return import_harness("utils").make_table(results)


def main() -> None:
    """Runs the harness's own command, which then knows this model."""
    import_harness("__main__").cli_evaluate()


if __name__ == "__main__":
    main()
