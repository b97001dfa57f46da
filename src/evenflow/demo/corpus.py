"""Five books cut into titled tales, and the split into training and held-out tales.

Owns what the text is. Does not tokenize, and does not know how training documents are made from a tale (`documents`).
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

# Whole tales the model never sees: 15 fables, 5 tales by the Grimms, 1 by Andersen, drawn at random and then written
# down, so that a change of the code around them cannot change the split.
HELD_OUT: frozenset[str] = frozenset(
    (
        "The Shepherd and the Sheep",
        "The Lion and the Boar",
        "The Woman and Her Hen",
        "The Three Tradesmen",
        "The Brother and the Sister",
        "The Lion and the Hare",
        "The Lamb and the Wolf",
        "The Birdcatcher, the Partridge, and the Cock",
        "The Hunter and the Horseman",
        "The Man, the Horse, the Ox, and the Dog",
        "The Two Men Who Were Enemies",
        "The Travelers and the Plane-Tree",
        "The Milk-Woman and Her Pail",
        "The Wolves and the Sheepdogs",
        "The Camel and Jupiter",
        "The Seven Ravens",
        "The Old Man and His Grandson",
        "Clever Hans",
        "Old Sultan",
        "The Wedding of Mrs Fox",
        "The Bell",
    )
)
# Fables that everybody asks for.
FAVOURITES: frozenset[str] = frozenset(
    (
        "The Wolf and the Lamb",
        "The Lion and the Mouse",
        "The Hare and the Tortoise",
        "The Fox and the Grapes",
        "The Fox and the Crow",
        "The Ants and the Grasshopper",
        "The Shepherd's Boy and the Wolf",
        "The Crow and the Pitcher",
        "The North Wind and the Sun",
        "The Dog in the Manger",
        "The Dog and the Shadow",
        "The Wolf in Sheep's Clothing",
        "The Wolf and the Crane",
        "The Wolf and the Housedog",
        "The Wolf and the Sheep",
        "The Hen and the Golden Eggs",
        "The Town Mouse and the Country Mouse",
        "The Oak and the Reeds",
        "The Ant and the Dove",
        "The Ass in the Lion's Skin",
        "The Boys and the Frogs",
        "The Farmer and the Snake",
        "The Frogs Asking for a King",
        "The Fox and the Goat",
        "The Fox and the Crane",
        "The Mice in Council",
        "The Father and His Sons",
        "The Miser",
        "The Ox and the Frog",
        "The Bear and the Two Travelers",
    )
)

JUNGLE_TITLES = (
    "Mowgli's Brothers",
    "Hunting-Song of the Seeonee Pack",
    "Kaa's Hunting",
    "Road-Song of the Bandar-Log",
    '"Tiger! Tiger!"',
    "Mowgli's Song",
    "The White Seal",
    "Lukannon",
    '"Rikki-Tikki-Tavi"',
    "Darzee's Chant",
    "Toomai of the Elephants",
    "Shiv and the Grasshopper",
    "Her Majesty's Servants",
    "Parade Song of the Camp Animals",
)
# Two slips of the digital editions: a lost article and a misread letter, both at the very start of a fable.
REPAIRS = {"WOLF, meeting": "A WOLF, meeting", "TEE KITES": "THE KITES"}
ALIASES = {
    "Down the Rabbit-Hole": ("Alice's Adventures in Wonderland", "Alice in Wonderland", "Alice"),
    "Little Red-Cap": ("Little Red Riding Hood",),
    "Mowgli's Brothers": ("Mowgli", "The Jungle Book"),
    "The Shepherd's Boy and the Wolf": ("The Boy Who Cried Wolf",),
    "The Ants and the Grasshopper": ("The Ant and the Grasshopper",),
    "The Hen and the Golden Eggs": ("The Goose That Laid the Golden Eggs",),
    "The Real Princess": ("The Princess and the Pea",),
    "Snowdrop": ("Snow White",),
    "Ashputtel": ("Cinderella",),
    "Briar Rose": ("Sleeping Beauty",),
    "The Frog-Prince": ("The Frog Prince",),
    "Rikki-Tikki-Tavi": ("Rikki-Tikki-Tavi the Mongoose",),
}
SMALL_WORDS = frozenset(
    ("a", "an", "and", "as", "at", "by", "for", "from", "in", "of", "on", "or", "that", "the", "to", "with")
)


@dataclass(frozen=True)
class Tale:
    """One tale. `paragraphs` exclude the title; `aliases` are other names a reader may ask for it by."""

    book: str
    title: str
    paragraphs: tuple[str, ...]
    aliases: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The tale as one string: title, blank line, paragraphs with blank lines between."""
        return "\n\n".join((self.title, *self.paragraphs))


def load_tales(tales_dir: Path) -> list[Tale]:
    """All tales of the five books in `tales_dir`, in the books' order."""
    return [tale for book, split in BOOKS.items() for tale in split(book, _paragraphs(tales_dir / f"{book}.txt"))]


def split_held_out(tales: list[Tale]) -> tuple[list[Tale], list[Tale]]:
    """(training tales, held-out tales). Raises ValueError if a held-out title is not in the books."""
    held_out = [tale for tale in tales if tale.title in HELD_OUT]
    if missing := HELD_OUT - {tale.title for tale in held_out}:
        raise ValueError(f"held-out tales are not in the books: {sorted(missing)}")
    return [tale for tale in tales if tale.title not in HELD_OUT], held_out


def _paragraphs(path: Path) -> list[str]:
    """The paragraphs of a book, without footnotes, their marks and rows of asterisks."""
    blocks = path.read_text(encoding="utf-8").split("\n\n")
    kept = [block.strip() for block in blocks if not re.match(r"\s*(\*|\[\*\]|\[later editions)", block)]
    return [re.sub(r" ?\[\*\]|\*", "", block).replace("_", "") for block in kept if block]


def _cut(book: str, paragraphs: list[str], is_title: Callable[[str], bool]) -> Iterator[Tale]:
    """A tale for each title paragraph, with the paragraphs up to the next one."""
    starts = [index for index, paragraph in enumerate(paragraphs) if is_title(paragraph)]
    for start, end in zip(starts, [*starts[1:], len(paragraphs)], strict=True):
        title = title_case(paragraphs[start])
        yield Tale(book, title, tuple(paragraphs[start + 1 : end]), ALIASES.get(title, ()))


def _aesop(book: str, paragraphs: list[str]) -> Iterator[Tale]:
    """Fables have short titles without a full stop; front matter, life, preface and notes are left out."""
    body = paragraphs[3 : paragraphs.index("LIFE OF AESOP")]
    for tale in _cut(book, body, lambda text: len(text) < 70 and not text.endswith((".", "!", "?", '"'))):
        opening = tale.paragraphs[0]
        for slip, repaired in REPAIRS.items():
            opening = re.sub(f"^{slip}", repaired, opening)
        yield Tale(book, tale.title, (plain_opening(opening), *tale.paragraphs[1:]), tale.aliases)


def _alice(book: str, paragraphs: list[str]) -> Iterator[Tale]:
    chapters = [re.sub(r"^CHAPTER \w+\. ", "\f", paragraph) for paragraph in paragraphs if paragraph != "THE END"]
    return _cut(book, chapters, lambda text: text.startswith("\f"))


def _andersen(book: str, paragraphs: list[str]) -> Iterator[Tale]:
    """The titles are those of the table of contents, which is the paragraph after the word CONTENTS."""
    contents = paragraphs.index("CONTENTS") + 1
    titles = {line.upper() for line in paragraphs[contents].splitlines()}
    return _cut(book, paragraphs[contents + 1 :], lambda text: text in titles)


def _grimm(book: str, paragraphs: list[str]) -> Iterator[Tale]:
    """Titles are all capitals, unlike numbered parts and the two stories within The Wedding of Mrs Fox."""
    parts = ("FIRST STORY", "SECOND STORY")
    return _cut(book, paragraphs, lambda text: text.isupper() and text not in parts and not text[0].isdigit())


def _jungle(book: str, paragraphs: list[str]) -> Iterator[Tale]:
    return _cut(book, paragraphs, lambda text: text in JUNGLE_TITLES)


BOOKS: dict[str, Callable[[str, list[str]], Iterator[Tale]]] = {
    "aesop": _aesop,
    "alice": _alice,
    "andersen": _andersen,
    "grimm": _grimm,
    "jungle": _jungle,
}


def title_case(title: str) -> str:
    """'THE KING OF THE HILL [OR SO]' becomes 'The King of the Hill'; letters after a hyphen are capitals too."""
    words = re.sub(r"\[.*\]", "", title).strip(' \f"').split()
    cased = [word.lower() if word.lower() in SMALL_WORDS else _capitalize(word) for word in words]
    return " ".join([_capitalize(words[0]), *cased[1:]])


def _capitalize(word: str) -> str:
    return re.sub(r"(^|-)(\w)", lambda match: match[1] + match[2].upper(), word.lower())


def plain_opening(text: str) -> str:
    """'A BAT who fell' becomes 'A Bat who fell': a fable opens in capitals, but speaks of the Bat afterwards."""
    match = re.match(r'"?[A-Z]+(?:[ ,\'-]+[A-Z]+)*\b', text)
    if match is None:
        return text
    rest = text[match.end() :]
    words = re.sub(r"[A-Z]+", lambda word: _opening_word(word[0], rest), match[0])
    return re.sub(r"[A-Za-z]", lambda letter: letter[0].upper(), words, count=1) + rest


def _opening_word(word: str, rest: str) -> str:
    """A capital if the rest of the paragraph writes the word with one, too (small words begin sentences: never)."""
    lower = word.lower()
    return word.capitalize() if lower not in SMALL_WORDS and re.search(rf"\b{lower.capitalize()}\b", rest) else lower
