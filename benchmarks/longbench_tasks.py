"""The 21 tasks of LongBench (arXiv 2308.14508, version 1), English and Chinese.

Data, lengths of answers and metrics are the published ones (github.com/THUDM/LongBench); the words
of the prompts are our own and mean the same, so that scores are close to published ones, not equal.
"""

from __future__ import annotations

import collections
import re
import string
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple


class Task(NamedTuple):
    """How a task is asked and judged."""

    group: str
    language: str
    """"en" or "zh"."""
    metric: str
    """A name of `METRICS`."""
    new_tokens: int
    """That the model may write."""
    prompt: str
    """With places for `{context}` and `{input}`."""
    by_example: bool = False
    """Its context are solved examples, or code, which go on: never a chat, and what follows the
    first line of an answer is the next example (code: see the metric)."""
    one_line: bool = False
    """The end of a line ends the answer."""


QA, SUMMARY = "question answering", "summaries"
FEW, SYNTHETIC, CODE = "by example", "synthetic", "code"

SHORT_ANSWER = (
    "Answer the question from the passages below. Write the answer alone, without any other words."
    "\n\nPassages:\n{context}\n\nAnswer the question from the passages above. Write the answer "
    "alone, without any other words.\n\nQuestion: {input}\nAnswer:"
)

TASKS: dict[str, Task] = {
    "narrativeqa": Task(
        QA,
        "en",
        "f1",
        128,
        "Below is a story, a novel or a film script, and a question about it. Answer in one phrase "
        "if you can, as briefly as possible, and explain nothing.\n\nStory: {context}\n\nNow the "
        "question about this story. Answer as briefly as possible and explain nothing.\n\n"
        "Question: {input}\n\nAnswer:",
    ),
    "qasper": Task(
        QA,
        "en",
        "f1",
        128,
        "Below are a scientific article and a question about it. Answer with one phrase or "
        'sentence, as briefly as you can. If the article does not tell, write "unanswerable". To '
        'a question of yes or no answer "yes", "no" or "unanswerable". Explain nothing.\n\n'
        "Article: {context}\n\nAnswer the question from the article above, as briefly as you can: "
        'one phrase or sentence, "yes" or "no", or "unanswerable" if the article does not tell. '
        "Explain nothing.\n\nQuestion: {input}\n\nAnswer:",
    ),
    "multifieldqa_en": Task(
        QA,
        "en",
        "f1",
        64,
        "Read this text, then answer a question about it briefly.\n\n{context}\n\nAnswer this "
        "question about the text above. Write the answer alone.\n\nQuestion: {input}\nAnswer:",
    ),
    "multifieldqa_zh": Task(
        QA,
        "zh",
        "f1_zh",
        64,
        "请先读完这篇文字，再简短地回答关于它的问题。\n\n{context}\n\n请依据上面的文字回答问题，"
        "只写答案，不写别的。\n\n问题：{input}\n答案：",
    ),
    "hotpotqa": Task(QA, "en", "f1", 32, SHORT_ANSWER),
    "2wikimqa": Task(QA, "en", "f1", 32, SHORT_ANSWER),
    "musique": Task(QA, "en", "f1", 32, SHORT_ANSWER),
    "dureader": Task(
        QA,
        "zh",
        "rouge_zh",
        128,
        "请依据下列文章回答问题。\n\n文章：{context}\n\n请依据上面的文章回答。\n\n问题：{input}\n回答：",
    ),
    "gov_report": Task(
        SUMMARY,
        "en",
        "rouge",
        512,
        "Below is a report by a government agency. Summarise it in one page.\n\nReport:\n{context}"
        "\n\nSummarise this report in one page.\n\nSummary:",
    ),
    "qmsum": Task(
        SUMMARY,
        "en",
        "rouge",
        512,
        "Below are the minutes of a meeting, and a request about it. Answer it in one or a few "
        "sentences.\n\nMinutes:\n{context}\n\nAnswer this request, from the minutes above, in one "
        "or a few sentences.\n\nRequest: {input}\nAnswer:",
    ),
    "multi_news": Task(
        SUMMARY,
        "en",
        "rouge",
        512,
        "Below are news articles about one event. Summarise all of them in one page.\n\nNews:\n"
        "{context}\n\nSummarise all of the news in one page.\n\nSummary:",
    ),
    "vcsum": Task(
        SUMMARY,
        "zh",
        "rouge_zh",
        512,
        "下面是一场会议的记录，请写出它的总结。\n\n会议记录：\n{context}\n\n会议总结：",
    ),
    "trec": Task(
        FEW,
        "en",
        "classes",
        64,
        "Say of what type each question is. Here are some examples.\n\n{context}\n{input}",
        by_example=True,
    ),
    "triviaqa": Task(
        FEW,
        "en",
        "f1",
        32,
        "Answer the question from the passage. Write the answer alone, without any other words. "
        "Here are some examples.\n\n{context}\n\n{input}",
        by_example=True,
    ),
    "samsum": Task(
        FEW,
        "en",
        "rouge",
        128,
        "Summarise each dialogue in a few short sentences. Here are some examples.\n\n{context}\n\n"
        "{input}",
        by_example=True,
        one_line=True,
    ),
    "lsht": Task(
        FEW,
        "zh",
        "classes",
        64,
        "请说出每条新闻属于哪一类。下面有一些例子。\n\n{context}\n{input}",
        by_example=True,
    ),
    "passage_count": Task(
        SYNTHETIC,
        "en",
        "count",
        32,
        "Below are several paragraphs, some of which are copies of others. How many are there, if "
        "each is counted once, however often it comes?\n\n{context}\n\nGive the number of "
        "different paragraphs, as a number alone (one, for example, is 1).\n\nThe number of "
        "different paragraphs is:",
    ),
    "passage_retrieval_en": Task(
        SYNTHETIC,
        "en",
        "retrieval",
        32,
        "Below are 30 paragraphs of an encyclopaedia, and a summary of one of them. Which one?\n\n"
        "{context}\n\nThe summary:\n\n{input}\n\nName the paragraph that it summarises, in the "
        'form "Paragraph 1", "Paragraph 2" and so on.\n\nAnswer:',
    ),
    "passage_retrieval_zh": Task(
        SYNTHETIC,
        "zh",
        "retrieval_zh",
        32,
        "下面有若干段落，还有其中一段的摘要。摘要说的是哪一段？\n\n{context}\n\n摘要：\n\n{input}\n\n"
        "请写出它的段落号，格式如“段落1”、“段落2”。\n\n答案：",
    ),
    "lcc": Task(
        CODE,
        "en",
        "code",
        64,
        "Write the next line of this code.\n{context}Next line of code:\n",
        by_example=True,
    ),
    "repobench-p": Task(
        CODE,
        "en",
        "code",
        64,
        "Write the next line of this code.\n{context}{input}Next line of code:\n",
        by_example=True,
    ),
}
"""By name, in the published order of groups."""


# Metrics. Each takes a prediction, one right answer and all classes, and gives 0..1.


def f1(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Of the words of both, without case, punctuation and articles, as SQuAD counts it."""
    return _overlap(_english_words(prediction), _english_words(answer))


def f1_zh(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """The same of Chinese words, as jieba divides them."""
    return _overlap(_chinese_words(prediction), _chinese_words(answer))


def rouge(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """F of ROUGE-L, by the package `rouge`, which the published scores are from."""
    # Without words the package raises.
    if not prediction.replace(".", "").strip() or not answer.replace(".", "").strip():
        return 0.0
    from rouge import Rouge

    with _deep_recursion():
        scores = Rouge(metrics=["rouge-l"], stats=["f"]).get_scores(prediction, answer)
    return scores[0]["rouge-l"]["f"]


def rouge_zh(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """The same of Chinese words, as jieba divides them."""
    return rouge(*(" ".join(_cut(text)) for text in (prediction, answer)))


def choice(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """1 over the number of classes that the prediction names, if the right one is among them.

    A class whose name is part of the right one's does not count: it is named along with it.
    """
    named = [name for name in classes if name in prediction]
    named = [name for name in named if name == answer or name not in answer]
    return 1 / len(named) if answer in named else 0.0


def retrieval(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """The share of the prediction's numbers that are the one of the answer, "Paragraph N"."""
    return _numbers(prediction, re.findall(r"Paragraph (\d+)", answer))


def retrieval_zh(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """The same for Chinese."""
    return _numbers(prediction, re.findall(r"段落(\d+)", answer))


def count(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """The share of the prediction's numbers that are the answer."""
    return _numbers(prediction, [answer.strip()])


def code(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Edit similarity of the first line that is code, not comment or markup."""
    from rapidfuzz import fuzz

    lines = prediction.lstrip("\n").split("\n")
    first = next((x for x in lines if not any(mark in x for mark in ("`", "#", "//"))), "")
    return fuzz.ratio(first, answer) / 100


METRICS: dict[str, Callable[[str, str, Sequence[str]], float]] = {
    "f1": f1,
    "f1_zh": f1_zh,
    "rouge": rouge,
    "rouge_zh": rouge_zh,
    "classes": choice,
    "retrieval": retrieval,
    "retrieval_zh": retrieval_zh,
    "count": count,
    "code": code,
}


def score(task: str, answers: Sequence[str], classes: Sequence[str], prediction: str) -> float:
    """0..1: the best over all right answers.

    Raises:
        ImportError: a library of the metric is not installed.
    """
    kind = TASKS[task]
    if kind.by_example and kind.metric != "code":
        prediction = prediction.lstrip("\n").split("\n")[0]
    try:
        return max(METRICS[kind.metric](prediction, answer, classes) for answer in answers)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"the metric of {task} needs {error.name}; pip install 'retro_ops[eval]'"
        ) from error


def _overlap(words: Sequence[str], expected: Sequence[str]) -> float:
    common = (collections.Counter(words) & collections.Counter(expected)).total()
    if not common:
        return 0.0
    precision, recall = common / len(words), common / len(expected)
    return 2 * precision * recall / (precision + recall)


def _numbers(prediction: str, expected: Sequence[str]) -> float:
    found = re.findall(r"\d+", prediction)
    right = sum(number == expected[0] for number in found) if expected else 0
    return right / len(found) if found else 0.0


def _english_words(text: str) -> list[str]:
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _chinese_words(text: str) -> list[str]:
    words = ("".join(filter(_is_letter, word.lower())) for word in _cut(text))
    return [word for word in words if word]


def _is_letter(character: str) -> bool:
    """Neither space nor punctuation of any language."""
    kind = unicodedata.category(character)
    return not character.isspace() and kind[0] != "P" and character not in string.punctuation


def _cut(text: str) -> Any:
    import logging
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports what setuptools is about to drop
        import jieba
    jieba.setLogLevel(logging.WARNING)  # it reports loading its dictionary
    return jieba.cut(text, cut_all=False)


@contextmanager
def _deep_recursion() -> Iterator[None]:
    """For `rouge`, which goes one call deeper with every word of a sentence."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(max(limit, 20_000))
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)
