"""Varied prose from a small grammar, to hide facts in: haystacks without a data set."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import NamedTuple

WORDS = {
    "name": "Ada Bruno Carla Dmitri Elena Farid Greta Hugo Ines Jonas Kiran Lena Marco Nadia Oskar "
    "Priya Quentin Rosa Stefan Tara Umar Vera Walter Ximena Yusuf Zora",
    "family": "Albrecht Bishara Costa Duval Eriksen Fontaine Grady Haddad Ivanova Jansen Kowalski "
    "Lindqvist Moreau Novak Okafor Petrov Quist Rahman Silva Tanaka Ueda Vargas Weiss Yilmaz",
    "trade": "baker carpenter clockmaker ferryman gardener geologist glassblower harbourmaster "
    "journalist librarian mason nurse painter photographer potter surveyor tailor teacher",
    "town": "Arlow Brackwater Coldmere Dunhaven Eastwick Fernley Greymoor Holtby Kestwick "
    "Larkfield Millbrook Northam Oakhurst Pinewood Ravensworth Saltmarsh Thornbury Westerleigh",
    "place": "bakery bridge canal chapel courtyard garden harbour library lighthouse market meadow "
    "mill museum orchard pier quarry railway-station river school square theatre tower workshop",
    "thing": "basket bicycle book box bucket camera candle chair clock coat compass diary drum key "
    "kettle lamp ladder lantern letter map mirror notebook parcel piano picture stove telescope "
    "trunk umbrella violin",
    "material": "brass canvas clay copper cotton glass granite iron leather linen oak paper pine "
    "porcelain silver slate steel straw tin velvet wool",
    "adjective": "ancient blue broken careful cheerful crooked dusty elegant forgotten gentle "
    "heavy hollow narrow noisy ordinary pale patient quiet rough shallow slender sturdy tired "
    "unusual warm weathered wide",
    "weather": "a cold wind|a light rain|a thick fog|bright sunshine|drifting snow|heavy clouds|"
    "a sudden storm|a warm breeze|morning frost|thunder in the distance",
    "season": "spring summer autumn winter",
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "time": "before dawn|after breakfast|around noon|late in the afternoon|in the evening|"
    "shortly before midnight|when the bells rang|as the shops were closing",
    "food": "apples barley-bread cheese chestnuts dumplings fish-soup honey lentils olives "
    "pancakes pears plums porridge potatoes smoked-trout tea walnuts",
    "animal": "badger cat crow dog donkey fox goat goose hare hedgehog heron horse otter owl sheep "
    "sparrow squirrel swan",
    "did": "carried|described|examined|found|borrowed|repaired|sketched|sold|"
    "cleaned|inherited|hid|weighed|wrapped|measured|painted",
    "felt": "curious|relieved|uncertain|pleased|impatient|calm|homesick|proud|puzzled|grateful",
    "subject": "the price of timber|an old map of the coast|the flood of the previous year|"
    "how bees find their way|the new railway|a play that nobody had finished|the history of salt|"
    "the repair of the town clock|why the river had changed its course|the best way to dry herbs|"
    "a letter from abroad|the shape of sails|what the council had decided|how glass is made",
    "verdict": "which surprised everyone|though few people believed it|and nobody objected|"
    "and the matter was soon forgotten|which proved to be a mistake|and it was worth the trouble|"
    "as had been agreed|although it took longer than planned|and the neighbours noticed",
}
"""Word lists; entries of several words are separated by |."""

SENTENCES = (
    "On {day} {name} {family}, a {trade} from {town}, {did} a {adjective} {thing} by the {place}.",
    "{weather:cap} passed over {town}, and the {place} stood empty {time}.",
    "The {trade} spoke for an hour about {subject}, {verdict}.",
    "In {season} the {place} of {town} smells of {food} and {material}.",
    "{name} felt {felt} and walked past the {place} with a {thing} made of {material}.",
    "A {animal} slept under the {adjective} {thing} while {name} and {name} spoke of {subject}.",
    "Nobody in {town} remembered who had {did} the {material} {thing}, {verdict}.",
    "For supper there were {food} and {food}, and {name} told a story about {subject}.",
    "The {adjective} road from {town} to {town} follows the river past an old {place}.",
    "{time:cap} the {trade} closed the {place} and counted every {thing} on the shelf.",
    "It is said that the {place} was built of {material} by a {trade} named {family}.",
    "Two visitors asked {name} {family} about {subject} and left with a {adjective} {thing}.",
    "There was {weather} that {season}, and the {animal} did not come back to the {place}.",
    "Because the {thing} was {adjective}, {name} traded it for {food} in {town}.",
    "Every {day} the {trade} {did} something: a {thing}, a {adjective} {thing}, or a piece of "
    "{material}.",
    '"I never cared for {food}," said {name}, "but {subject} is another matter."',
    "The council met {time} and argued about {subject}, {verdict}.",
    "Somebody had left a {thing} of {material} beside the {place}, and a {animal} was guarding it.",
    "{name} wrote to the {trade} in {town} that the {adjective} {place} would open in {season}.",
    "From the tower one could see {weather} over {town} and a {animal} by the {place}.",
)

LISTS = {
    name: [word.replace("-", " ") for word in (words.split("|") if "|" in words else words.split())]
    for name, words in WORDS.items()
}


def prose(seed: int) -> Callable[[], str]:
    """A function that gives one new paragraph of prose at each call; the same ones for a seed."""
    random_ = random.Random(seed)

    def fill(match: re.Match[str]) -> str:
        name, _, style = match[1].partition(":")
        word = random_.choice(LISTS[name])
        return word[0].upper() + word[1:] if style == "cap" else word

    def paragraph() -> str:
        count = random_.randint(4, 8)
        chosen = random_.sample(SENTENCES, count)
        text = " ".join(re.sub(r"{([a-z:]+)}", fill, sentence) for sentence in chosen)
        return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)

    return paragraph


class Needle(NamedTuple):
    """A fact to hide, the question that ends a prompt, and what the model should write then."""

    fact: str
    question: str
    answer: str


def make_needle(seed: int) -> Needle:
    """A fact about a number that no prose contains; another one for each seed."""
    random_ = random.Random(seed)
    owner = f"{random_.choice(LISTS['name'])} {random_.choice(LISTS['family'])}"
    number = str(random_.randint(10000, 99999))
    subject = f"The secret number of {owner} from {random_.choice(LISTS['town'])}"
    return Needle(
        fact=f"{subject} is {number}. Remember it.",
        question=f"{subject} is",
        answer=number,
    )


def haystack(
    needle: Needle, tokens: int, depth: float, count_tokens: Callable[[str], int], *, seed: int = 0
) -> str:
    """A prompt of about `tokens` tokens of prose, with the needle's fact in it and its question
    last.

    Args:
        needle: what to hide.
        tokens: of the whole prompt; it comes out at most one paragraph shorter.
        depth: where the fact stands: 0 at the beginning, 1 at the end.
        count_tokens: tokens of a text.
        seed: of the prose.

    Raises:
        ValueError: `tokens` has no room for the fact, or `depth` lies outside 0..1.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depth must lie in 0..1, got {depth}")
    room = tokens - count_tokens(f"{needle.fact}\n\n{needle.question}")
    if room < 0:
        raise ValueError(f"a fact and its question do not fit in {tokens} tokens")
    next_paragraph = prose(seed)
    paragraphs: list[str] = []
    while True:
        paragraph = next_paragraph()
        room -= count_tokens(f"{paragraph}\n\n")
        if room < 0:
            break
        paragraphs.append(paragraph)
    paragraphs.insert(round(depth * len(paragraphs)), needle.fact)
    return "\n\n".join([*paragraphs, needle.question])
