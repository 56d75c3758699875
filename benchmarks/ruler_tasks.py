"""The 13 tasks of RULER (arXiv 2404.06654), made anew from their definitions, for any length.

The paper and the data of its authors (github.com/NVIDIA/RULER, scripts/data/synthetic) say what a
task is: what hides where, how often, what is asked, how many tokens answer it and what counts as
right. Wording and text are our own, so scores are comparable among themselves, not to the digit
with published ones.
"""

from __future__ import annotations

import bisect
import itertools
import json
import math
import random
import re
import string
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from retro_ops.models.prose import LISTS, prose

FILLER = "The lake is still. The hills are far. The bread is warm. We come in. We go out again."
"""What `niah_single_1` and `vt` repeat, line after line."""
DEPTHS = [100 * i / 39 for i in range(40)]
"""Per cent of a text before a hidden sentence."""
SENTENCE_END = re.compile(r"""(?<=[.!?]["')])\s+(?=["'(]?[A-Z])|(?<=[.!?])\s+(?=["'(]?[A-Z])""")


class Draft(NamedTuple):
    """What a task asks at one size of its haystack."""

    prompt: str
    """Instruction, context and question."""
    prefix: str
    """How the answer begins; the model goes on from here."""
    answers: list[str]


class Text:
    """Running text that is cut to any number of words.

    Args:
        sentences: in their order; repeated from the beginning where more words are asked for.
    """

    def __init__(self, sentences: Iterable[str]) -> None:
        self.sentences = [sentence for sentence in sentences if sentence.strip()]
        if not self.sentences:
            raise ValueError("the essays have no text; give a directory with .txt files")
        counts = (len(sentence.split()) for sentence in self.sentences)
        self._ends = list(itertools.accumulate(counts))

    def cut(self, words: int) -> list[str]:
        """Sentences of the first `words` words; the last one may be a part of one."""
        rounds, rest = divmod(words, self._ends[-1])
        whole = bisect.bisect_right(self._ends, rest)
        cut = self.sentences * rounds + self.sentences[:whole]
        over = rest - (self._ends[whole - 1] if whole else 0)
        if over:
            cut.append(" ".join(self.sentences[whole].split()[:over]))
        return cut

    @classmethod
    def generated(cls, words: int, seed: int) -> Text:
        """Varied prose of at least `words` words."""
        paragraph = prose(seed)
        sentences: list[str] = []
        count = 0
        while count < words:
            text = paragraph()
            count += len(text.split())
            sentences += SENTENCE_END.split(text)
        return cls(sentences)

    @classmethod
    def read(cls, directory: Path) -> Text:
        """All `*.txt` of a directory, in the order of their names.

        Raises:
            ValueError: there are none, or they are empty.
        """
        files = sorted(directory.glob("*.txt"))
        if not files:
            raise ValueError(f"essays: no *.txt in {str(directory)!r}")
        texts = (" ".join(file.read_text("utf-8").split()) for file in files)
        return cls(sentence for text in texts for sentence in SENTENCE_END.split(text))


@dataclass(frozen=True)
class Quiz:
    """A question about documents."""

    question: str
    answers: tuple[str, ...]
    documents: tuple[str, ...]
    """Those that answer it, and others that came with it."""


@dataclass
class Sources:
    """What tasks are made of.

    Args:
        essay: running text.
        squad: a file of SQuAD (version 1.1 or 2.0) for `qa_1`; None: made-up facts.
        hotpotqa: a file of HotpotQA (distractor setting) for `qa_2`; None: made-up facts.

    Raises:
        ImportError: the word lists are not installed.
        ValueError: a file is not what it should be.
    """

    essay: Text
    squad: Path | None = None
    hotpotqa: Path | None = None
    adjectives: list[str] = field(init=False)
    nouns: list[str] = field(init=False)
    words: list[str] = field(init=False)
    quizzes: dict[str, tuple[list[Quiz], list[str]]] = field(init=False, default_factory=dict)
    """By task: questions, and documents for all of them."""

    def __post_init__(self) -> None:
        self.nouns, self.adjectives, verbs = (
            _word_list(kind) for kind in ("noun", "adjective", "verb")
        )
        self.words = sorted({*self.nouns, *self.adjectives, *verbs})
        for task, file, read in (
            ("qa_1", self.squad, read_squad),
            ("qa_2", self.hotpotqa, read_hotpotqa),
        ):
            if file is not None:
                quizzes = read(file)
                documents = dict.fromkeys(d for quiz in quizzes for d in quiz.documents)
                self.quizzes[task] = (quizzes, list(documents))


def _word_list(kind: str) -> list[str]:
    try:
        from wonderwords import RandomWord
    except ImportError as error:
        raise ImportError("RULER needs word lists; pip install 'retro_ops[eval]'") from error
    listed = RandomWord().filter(include_categories=[kind])
    return sorted({word for word in listed if re.fullmatch("[a-z]{3,}", word)})


def read_squad(path: Path) -> list[Quiz]:
    """Questions of a SQuAD file that have an answer.

    Raises:
        ValueError: the file is not of that form.
    """
    data = _read_json(path)
    try:
        return [
            Quiz(qa["question"], tuple(dict.fromkeys(a["text"] for a in qa["answers"])), (context,))
            for article in data["data"]
            for paragraph in article["paragraphs"]
            for context in [paragraph["context"]]
            for qa in paragraph["qas"]
            if qa["answers"]
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a SQuAD file: {error!r}") from error


def read_hotpotqa(path: Path) -> list[Quiz]:
    """Questions of a HotpotQA file.

    Raises:
        ValueError: the file is not of that form.
    """
    data = _read_json(path)
    try:
        return [
            Quiz(
                entry["question"],
                (entry["answer"],),
                tuple(f"{title}\n{''.join(sentences)}" for title, sentences in entry["context"]),
            )
            for entry in data
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a HotpotQA file: {error!r}") from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


# Needles in a haystack


def _needle(kind: str, key: str, value: str) -> str:
    return f"One secret {kind} of the {key} is {value}."


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _uuid(random_: random.Random) -> str:
    return str(uuid.UUID(int=random_.getrandbits(128), version=4))


@dataclass(frozen=True)
class Niah:
    """Finds `asked` of `keys` keys with `values` values each.

    Args:
        haystack: "filler" (one line again and again), "essay" (running text) or "needles" (other
            keys with values). A unit of size is a line, a word or a needle.
        key_kind, value_kind: "words", "number" or "uuid".
    """

    haystack: str
    key_kind: str = "words"
    value_kind: str = "number"
    keys: int = 1
    values: int = 1
    asked: int = 1

    def __call__(self, random_: random.Random, size: int, length: int, sources: Sources) -> Draft:
        """The task with `size` units of hay."""
        used: set[str] = set()

        def new(kind: str) -> str:
            while True:
                if kind == "number":
                    made = str(random_.randint(1_000_000, 9_999_999))
                elif kind == "uuid":
                    made = _uuid(random_)
                else:
                    pair = random_.choice(sources.adjectives), random_.choice(sources.nouns)
                    made = "-".join(pair)
                if made not in used:
                    used.add(made)
                    return made

        keys = [new(self.key_kind) for _ in range(self.keys)]
        values = {key: [new(self.value_kind) for _ in range(self.values)] for key in keys}
        kind = "number" if self.value_kind == "number" else "identifier"
        needles = [_needle(kind, key, value) for key in keys for value in values[key]]
        random_.shuffle(needles)
        asked = random_.sample(keys, self.asked)
        if self.haystack == "essay":
            text = sources.essay.cut(size)
            depths = random_.sample(DEPTHS, len(needles))
            places = [round(len(text) * depth / 100) for depth in depths]
        else:
            # The same places, whatever the size, up to rounding.
            share = [random_.random() for _ in needles]
            places = [round(size * part) for part in share]
            if self.haystack == "filler":
                text = [FILLER] * size
            else:
                text = [
                    _needle(kind, new(self.key_kind), new(self.value_kind)) for _ in range(size)
                ]
        for place, needle in sorted(zip(places, needles, strict=True), reverse=True):
            text.insert(place, needle)
        context = (" " if self.haystack == "essay" else "\n").join(text)
        answers = [value for key in asked for value in values[key]]
        if len(answers) == 1:
            hidden, them, are, wanted = f"A secret {kind} is", "it", "is", f"secret {kind}"
        else:
            hidden, them, are = f"Secret {kind}s are", "them", "are"
            wanted = f"{len(answers)} secret {kind}s"
        wanted += f" of the {_listed(asked)}"
        return Draft(
            prompt=f"{hidden} hidden in the text below. Remember {them}, you will be asked about "
            f"{them} at the end.\n\n{context}\n\nQuestion: What {are} the {wanted}?",
            prefix=f"Answer: The {wanted} {are}",
            answers=answers,
        )


# Variables that are assigned along a chain

HOPS = 4


def variable_tracking(random_: random.Random, size: int, length: int, sources: Sources) -> Draft:
    """Which variables hold a value that was handed on four times; a unit is a line of filler."""
    example = _chain(random_, 6, 3)
    task = _chain(random_, size, 5)
    solved = f"{example.prompt}\n{example.prefix} {', '.join(example.answers)}."
    return Draft(f"{solved}\n\n{task.prompt}", task.prefix, task.answers)


def _chain(random_: random.Random, size: int, letters: int) -> Draft:
    names: list[str] = []
    while len(names) <= HOPS:
        name = "".join(random_.choices(string.ascii_uppercase, k=letters))
        if name not in names:
            names.append(name)
    value = str(random_.randint(10_000, 99_999))
    sources_ = [value, *names]
    statements = [f"let {name} = {given}." for name, given in zip(names, sources_, strict=False)]
    places = sorted(round(size * random_.random()) for _ in statements)
    lines = [FILLER] * size
    for place, statement in reversed(list(zip(places, statements, strict=True))):
        lines.insert(place, statement)
    context = "\n".join(lines)
    return Draft(
        prompt="Variables get their values in the text below, some of them from one another. Keep "
        f"track of them.\n\n{context}\n\nQuestion: Which {len(names)} variables have the value "
        f"{value} in the end?",
        prefix=f"Answer: Following the assignments, the {len(names)} variables with the value "
        f"{value} are",
        answers=names,
    )


# Words to count

COMMON = 10


def common_words(random_: random.Random, size: int, length: int, sources: Sources) -> Draft:
    """The ten words that a list repeats most; a unit is another word of the list."""
    short = length < 4096
    example_words, example_counts = (20, (3, 1)) if short else (40, (10, 3))
    counts = (6, 1) if short else (30, 3)
    words = _distinct_words(random_, sources.words, example_words + size)
    example = _word_list_question(random_, words[:example_words], *example_counts)
    task = _word_list_question(random_, words[example_words:], *counts)
    solved = f"{example.prompt}\n{example.prefix} {', '.join(example.answers)}."
    return Draft(f"{solved}\n\n{task.prompt}", task.prefix, task.answers)


def _distinct_words(random_: random.Random, words: list[str], count: int) -> list[str]:
    """Words in random order, and if there are too few, compounds of two of them."""
    chosen = random_.sample(words, len(words))[:count]
    used = set(chosen)
    while len(chosen) < count:
        compound = "".join(random_.choices(words, k=2))
        if compound not in used:
            used.add(compound)
            chosen.append(compound)
    return chosen


def _word_list_question(
    random_: random.Random, words: list[str], common_count: int, other_count: int
) -> Draft:
    common, others = words[:COMMON], words[COMMON:]
    entries = common * common_count + others * other_count
    random_.shuffle(entries)
    listed = " ".join(f"{number}. {word}" for number, word in enumerate(entries, 1))
    return Draft(
        prompt="Some words occur more often than others in the numbered list below. Remember "
        f"which.\n\n{listed}\n\nQuestion: Which {COMMON} words occur most often in the list?",
        prefix=f"Answer: The {COMMON} words that occur most often in the list are",
        answers=common,
    )


def frequent_words(random_: random.Random, size: int, length: int, sources: Sources) -> Draft:
    """The three most frequent of coded words whose counts fall with the square of their rank.

    A unit is a word. The most frequent one of all is noise, dots.
    """
    coded: list[str] = []
    while len(coded) < max(length // 50, 5):
        word = "".join(random_.choices(string.ascii_lowercase, k=6))
        if word not in coded:
            coded.append(word)
    coded[0] = "..."
    zeta = math.pi**2 / 6
    text = [
        word for rank, word in enumerate(coded, 1) for _ in range(int(size / (rank * rank * zeta)))
    ]
    random_.shuffle(text)
    return Draft(
        prompt="The words of the text below are in code. Count how often each one occurs, and "
        f"leave out the dots, '...'.\n\n{' '.join(text)}\n\nQuestion: Which 3 coded words occur "
        "most often in the text?",
        prefix="Answer: The 3 coded words that occur most often, apart from the dots, are",
        answers=coded[1:4],
    )


# Questions about documents


@dataclass(frozen=True)
class DocumentQuestion:
    """A question that one or two of many documents answer; a unit is another document.

    Args:
        task: "qa_1" or "qa_2", which looks an answer up in two steps.
    """

    task: str

    def __call__(self, random_: random.Random, size: int, length: int, sources: Sources) -> Draft:
        """The task with `size` documents that are of no use."""
        if self.task in sources.quizzes:
            quizzes, pool = sources.quizzes[self.task]
            quiz = random_.choice(quizzes)
            own = set(quiz.documents)
            picked = random_.sample(pool, min(size + len(own), len(pool)))
            others = [document for document in picked if document not in own][:size]
        else:
            quiz, others = _made_up(random_, size, steps=2 if self.task == "qa_2" else 1)
        documents = [*quiz.documents, *others]
        random_.shuffle(documents)
        listed = "\n\n".join(f"Document {n}:\n{text}" for n, text in enumerate(documents, 1))
        return Draft(
            prompt="Answer the question that follows the documents, from what they say. Give only "
            f"the answer, in as few words as possible.\n\n{listed}\n\nQuestion: {quiz.question}",
            prefix="Answer:",
            answers=list(quiz.answers),
        )


def _made_up(random_: random.Random, size: int, steps: int) -> tuple[Quiz, list[str]]:
    used: set[str] = set()

    def new(make: Callable[[], str]) -> str:
        while (made := make()) in used:
            pass
        used.add(made)
        return made

    def pick(name: str) -> str:
        return random_.choice(LISTS[name])

    def person() -> tuple[str, dict[str, str], str]:
        name = new(
            lambda: f"{pick('name')} {random_.choice(string.ascii_uppercase)}. {pick('family')}"
        )
        facts = {
            "In which town was {} born?": pick("town"),
            "In which year was {} born?": str(random_.randint(1700, 1980)),
            "What was the profession of {}?": pick("trade"),
            "Which animal did {} keep?": pick("animal"),
        }
        town, year, trade, animal = facts.values()
        place = pick("place")
        sentences = [
            f"{name} was born in {town} in {year}.",
            f"The profession of {name} was that of a {trade}.",
            f"For many years {name} kept a {animal}.",
            f"Visitors remember a {pick('adjective')} {place} and much talk about "
            f"{pick('subject')}.",
        ]
        return name, facts, " ".join([sentences[0], *random_.sample(sentences[1:], 3)])

    def building(designer: str) -> tuple[str, str]:
        name = new(lambda: f"{pick('adjective')} {pick('place')} of {pick('town')}")
        return name, (
            f"The {name} was built of {pick('material')} in {random_.randint(1700, 1980)}. It was "
            f"designed by {designer}, {pick('verdict')}."
        )

    name, facts, text = person()
    question, answer = random_.choice(list(facts.items()))
    if steps == 1:
        quiz = Quiz(question.format(name), (answer,), (text,))
    else:
        built, other_text = building(name)
        asked = question.format(f"the person who designed the {built}")
        quiz = Quiz(asked, (answer,), (text, other_text))
    others = []
    for number in range(size):
        name, _, text = person()
        # Where two steps are asked for, every other document is about a building.
        others.append(building(name)[1] if steps == 2 and number % 2 else text)
    return quiz, others


# All of them


class Task(NamedTuple):
    """How a task is made and judged."""

    make: Callable[[random.Random, int, int, Sources], Draft]
    """Of a random generator, units of hay, tokens of prompt and answer, and sources."""
    new_tokens: int
    """That the model may write."""
    smallest: int = 0
    """Units of hay."""
    all_answers: bool = True
    """The share of the answers found counts; False: any one of them is right."""


TASKS: dict[str, Task] = {
    "niah_single_1": Task(Niah("filler"), 128),
    "niah_single_2": Task(Niah("essay"), 128),
    "niah_single_3": Task(Niah("essay", value_kind="uuid"), 128),
    "niah_multikey_1": Task(Niah("essay", keys=4), 128),
    "niah_multikey_2": Task(Niah("needles"), 128),
    "niah_multikey_3": Task(Niah("needles", key_kind="uuid", value_kind="uuid"), 128),
    "niah_multivalue": Task(Niah("essay", values=4), 128),
    "niah_multiquery": Task(Niah("essay", keys=4, asked=4), 128),
    "vt": Task(variable_tracking, 30),
    "cwe": Task(common_words, 120, smallest=COMMON + 2),
    "fwe": Task(frequent_words, 50, smallest=100),
    "qa_1": Task(DocumentQuestion("qa_1"), 32, all_answers=False),
    "qa_2": Task(DocumentQuestion("qa_2"), 32, all_answers=False),
}
"""By name, in the published order."""


def score(task: str, answers: Sequence[str], prediction: str) -> float:
    """0..1: the share of the answers that the prediction contains, whatever the case; for questions
    about documents, whether it contains any.
    """
    text = prediction.lower()
    found = [answer.lower() in text for answer in answers]
    return sum(found) / len(found) if TASKS[task].all_answers else float(any(found))


def most_units(task: str, sources: Sources) -> int | None:
    """Units of hay that there are; None: any number."""
    if task not in sources.quizzes:
        return None
    quizzes, pool = sources.quizzes[task]
    return len(pool) - max(len(quiz.documents) for quiz in quizzes)


def largest_size(
    count_tokens: Callable[[int], int], room: int, smallest: int, most: int | None = None
) -> int | None:
    """The largest size of a haystack whose prompt fits, or None if the smallest does not.

    A bisection that first tries where the line through what it knows meets the end.

    Args:
        count_tokens: tokens of the prompt of a size; grows with it.
        room: tokens that the prompt may have.
        smallest, most: units of hay.
    """
    low, low_tokens = smallest, count_tokens(smallest)
    if low_tokens > room:
        return None
    high = None if most is None else most + 1  # the smallest size that is known not to do
    slope = math.inf  # tokens of a unit
    for tries in itertools.count():
        if high is not None and high - low <= 1:
            break
        if tries == 0:
            size = low + 64
        elif tries < 8 or high is None:
            size = low + int((room - low_tokens) / slope)
        else:
            size = (low + high) // 2
        size = max(size, low + 1)
        size = size if high is None else min(size, high - 1)
        tokens = count_tokens(size)
        slope = max((tokens - low_tokens) / (size - low), 1e-3)
        if tokens > room:
            high = size
        else:
            low, low_tokens = size, tokens
    return low
