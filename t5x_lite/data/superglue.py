# SPDX-License-Identifier: Apache-2.0
"""Tasks of SuperGLUE (Wang et al., 2019) from its own JSONL files: questions with their choices.

Records are flattened, one question each, and put into a prompt: T5's (Raffel et al., 2020, appendix
D), or plain sentences that a decoder goes on with. T5 writes the noun that a pronoun of WSC stands
for; here the question is whether it stands for a given noun.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

Record = Mapping[str, Any]


class SuperGlueQuestion(NamedTuple):
    """A question with its choices.

    Attributes:
      input: text of the question.
      choices: texts that may follow it.
      answers: numbers of the right choices; () where the file has no label.
      answer_texts: the right answers as texts; those of ReCoRD are compared word by word.
      entities: of ReCoRD, the entity of each choice.
      group: what questions that are right together share, such as all answers to a question.
    """

    input: str
    choices: tuple[str, ...]
    answers: tuple[int, ...]
    answer_texts: tuple[str, ...] = ()
    entities: tuple[str, ...] = ()
    group: Any = None


class SuperGluePrompt(NamedTuple):
    """Templates of a task, with fields of its flat records in braces.

    Attributes:
      input: of the question.
      choices: of the choices, in the order of the task's labels; () takes the record's own.
    """

    input: str
    choices: tuple[str, ...] = ()


class SuperGlueTask(NamedTuple):
    """A task of SuperGLUE.

    Attributes:
      folder: its folder in the download.
      labels: labels of its files in the order of the choices.
      prompts: its prompts by style.
      flatten: yields flat records of one of the file.
    """

    folder: str
    labels: tuple[Any, ...]
    prompts: dict[str, SuperGluePrompt]
    flatten: Callable[[Record], Iterator[dict[str, Any]]]


def keep_record(record: Record) -> Iterator[dict[str, Any]]:
    """Yields a record that is flat already."""
    yield dict(record)


def flatten_copa(record: Record) -> Iterator[dict[str, Any]]:
    """Yields a record of COPA with its parts as they stand in a sentence."""
    flat = dict(record)
    flat["beginning"] = record["premise"].strip().rstrip(".")
    flat["link"] = {"cause": "because", "effect": "so"}[record["question"]]
    for name in ("choice1", "choice2"):
        flat[f"{name}_inside"] = record[name][:1].lower() + record[name][1:]
    yield flat


def flatten_multirc(record: Record) -> Iterator[dict[str, Any]]:
    """Yields every answer to every question of a passage."""
    passage = record["passage"]
    for question in passage["questions"]:
        for answer in question["answers"]:
            yield {
                "paragraph": passage["text"],
                "question": question["question"],
                "answer": answer["text"],
                "label": answer.get("label"),
                "group": (record.get("idx"), question.get("idx")),
            }


def flatten_record(record: Record) -> Iterator[dict[str, Any]]:
    """Yields every query of a passage, with the passage's entities as choices."""
    text = record["passage"]["text"]
    spans = record["passage"]["entities"]
    # The end of a span is its last character. An entity occurs several times.
    entities = dict.fromkeys(text[span["start"] : span["end"] + 1] for span in spans)
    # Highlights become sentences, as in T5.
    passage = re.sub(r"""([.?!"'])\n@highlight\n""", r"\1 ", text)
    passage = passage.replace("\n@highlight\n", ". ")
    for query in record["qas"]:
        answers = tuple(dict.fromkeys(each["text"] for each in query.get("answers", ())))
        before, _, after = query["query"].partition("@placeholder")
        yield {
            "passage": passage,
            "query": query["query"],
            "before": before.rstrip(),
            "entities": ", ".join(entities),
            "choices": tuple(entities),
            "after": after,
            "answer_texts": answers,
        }


def flatten_wsc(record: Record) -> Iterator[dict[str, Any]]:
    """Yields a record of WSC with its pronoun marked in the text."""
    target = record["target"]
    words = record["text"].split(" ")
    # Some words have a mark of punctuation behind them.
    place, pronoun = target["span2_index"], target["span2_text"]
    words[place] = words[place].replace(pronoun.split(" ")[0], f"*{pronoun.split(' ')[0]}*", 1)
    yield dict(record) | {
        "marked": " ".join(words),
        "pronoun": pronoun,
        "noun": target["span1_text"],
    }


NO_YES = (" no", " yes")
FALSE_TRUE = ("False", "True")
TASKS = {
    "boolq": SuperGlueTask(
        "BoolQ",
        (False, True),
        {
            "t5": SuperGluePrompt("boolq passage: {passage} question: {question}", FALSE_TRUE),
            "plain": SuperGluePrompt("{passage}\nQuestion: {question}?\nAnswer:", NO_YES),
        },
        keep_record,
    ),
    "cb": SuperGlueTask(
        "CB",
        ("entailment", "contradiction", "neutral"),
        {
            "t5": SuperGluePrompt(
                "cb hypothesis: {hypothesis} premise: {premise}",
                ("entailment", "contradiction", "neutral"),
            ),
            "plain": SuperGluePrompt(
                "{premise}\nQuestion: {hypothesis}. True, False, or Neither?\nAnswer:",
                (" True", " False", " Neither"),
            ),
        },
        keep_record,
    ),
    "copa": SuperGlueTask(
        "COPA",
        (0, 1),
        {
            "t5": SuperGluePrompt(
                "copa choice1: {choice1} choice2: {choice2} premise: {premise} "
                "question: {question}",
                ("choice1", "choice2"),
            ),
            "plain": SuperGluePrompt(
                "{beginning} {link}", (" {choice1_inside}", " {choice2_inside}")
            ),
        },
        flatten_copa,
    ),
    "multirc": SuperGlueTask(
        "MultiRC",
        (0, 1),
        {
            "t5": SuperGluePrompt(
                "multirc question: {question} answer: {answer} paragraph: {paragraph}", FALSE_TRUE
            ),
            "plain": SuperGluePrompt(
                "{paragraph}\nQuestion: {question}\nAnswer: {answer}\nIs the answer correct?",
                NO_YES,
            ),
        },
        flatten_multirc,
    ),
    "record": SuperGlueTask(
        "ReCoRD",
        (),
        {
            "t5": SuperGluePrompt("record query: {query} entities: {entities} passage: {passage}"),
            "plain": SuperGluePrompt("{passage}\n{before}", (" {choice}{after}",)),
        },
        flatten_record,
    ),
    "rte": SuperGlueTask(
        "RTE",
        ("entailment", "not_entailment"),
        {
            "t5": SuperGluePrompt(
                "rte hypothesis: {hypothesis} premise: {premise}",
                ("entailment", "not_entailment"),
            ),
            "plain": SuperGluePrompt(
                "{premise}\nQuestion: {hypothesis} True or False?\nAnswer:", (" True", " False")
            ),
        },
        keep_record,
    ),
    "wic": SuperGlueTask(
        "WiC",
        (False, True),
        {
            "t5": SuperGluePrompt(
                "wic sentence1: {sentence1} sentence2: {sentence2} word: {word}", FALSE_TRUE
            ),
            "plain": SuperGluePrompt(
                "Sentence 1: {sentence1}\nSentence 2: {sentence2}\nQuestion: Is the word '{word}' "
                "used in the same way in the two sentences above?\nAnswer:",
                NO_YES,
            ),
        },
        keep_record,
    ),
    "wsc": SuperGlueTask(
        "WSC",
        (False, True),
        {
            "t5": SuperGluePrompt("wsc noun: {noun} pronoun: {pronoun} text: {marked}", FALSE_TRUE),
            "plain": SuperGluePrompt(
                'Passage: {marked}\nQuestion: In the passage above, does the pronoun "*{pronoun}*" '
                'refer to "{noun}"?\nAnswer:',
                NO_YES,
            ),
        },
        flatten_wsc,
    ),
}


def list_questions(name: str, record: Record, style: str = "t5") -> Iterator[SuperGlueQuestion]:
    """Yields the questions of a record.

    Args:
      name: key of TASKS.
      record: a line of the task's file.
      style: of the prompt, t5 or plain.

    Raises:
      ValueError: the record lacks a field, or has another label than those of the task.
    """
    task = TASKS[name]
    try:
        for flat in task.flatten(record):
            yield make_question(task, flat, style)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(
            f"it is no record of SuperGLUE's {task.folder}: {type(error).__name__} {error}"
        ) from error


def expand_records(
    name: str, records: Iterator[tuple[str, dict | str]]
) -> Iterator[tuple[str, dict | str]]:
    """Yields the questions of records as inputs and targets, with the place of their record, or a
    message instead of a broken one.

    Args:
      name: key of TASKS.
      records: places and records, or messages.
    """
    for place, record in records:
        if isinstance(record, str):
            yield place, record
            continue
        try:
            for question in list_questions(name, record):
                yield place, {"inputs": question.input, "targets": list(question.answer_texts)}
        except ValueError as error:
            yield place, str(error)


def make_question(task: SuperGlueTask, flat: Record, style: str) -> SuperGlueQuestion:
    """A question of a flat record.

    Args:
      task: the task.
      flat: its fields.
      style: of the prompt.
    """
    prompt = task.prompts[style]
    text = prompt.input.format(**flat)
    if not task.labels:
        names, right = flat["choices"], flat["answer_texts"]
        template = prompt.choices[0] if prompt.choices else "{choice}"
        choices = tuple(template.format(choice=name, **flat) for name in names)
        answers = tuple(number for number, name in enumerate(names) if name in right)
        return SuperGlueQuestion(text, choices, answers, right, names)
    choices = tuple(choice.format(**flat) for choice in prompt.choices)
    label = flat.get("label")
    if label is None:
        return SuperGlueQuestion(text, choices, ())
    if label not in task.labels:
        raise ValueError(f"its label {label!r} is none of {', '.join(map(str, task.labels))}")
    number = task.labels.index(label)
    right = (choices[number],)
    return SuperGlueQuestion(text, choices, (number,), right, group=flat.get("group"))
