"""Prompts: from "noto cat on blue" to the eight token ids that the tiny model was trained with.

The training captions are [style] [one to four words of a thing] on [colour]. A prompt is brought into that form: words may
come in any order and case, a thing named without a style is drawn in the noto style and without a colour on white, and
words that the model does not know are left out and reported with the nearest known ones.
"""

from __future__ import annotations

import difflib
import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["COLOURS", "STYLES", "Prompt", "Vocabulary", "VOCABULARY_FILE"]

VOCABULARY_FILE = Path(__file__).with_name("vocabulary.json")
STYLES = ("twemoji", "noto")  # token ids 1 and 2; rows 0 and 1 of the style table, row 2 is "no style"
COLOURS = ("white", "red", "blue", "green", "yellow", "black")
DEFAULT_STYLE = "noto"
DEFAULT_COLOUR = "white"
THING_WORDS = 4
ARTICLES = frozenset({"a", "an", "the"})
# ComfyUI's emphasis, "(cat:1.3)": the brackets fall with the punctuation, the number has to go with its colon.
_WEIGHT = re.compile(r":\s*[+-]?(\d+\.?\d*|\.\d+)\s*(?=\))")
_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model reads it.

    ids: token ids padded with 0 to the vocabulary's length.
    style: row of the style table: 0 twemoji, 1 noto, 2 none.
    text: the canonical words behind the ids.
    unknown: words left out because the model does not know them.
    surplus: known words left out because they came after the fourth word of a thing, or a second style or colour.
    unknown_colours: those of the unknown words that stood after "on", where a background is expected.
    """

    ids: tuple[int, ...]
    style: int
    text: str
    unknown: tuple[str, ...] = ()
    surplus: tuple[str, ...] = ()
    unknown_colours: tuple[str, ...] = ()


class Vocabulary:
    """The model's words and the things they name, read from vocabulary.json (or another such table)."""

    def __init__(self, tokens: dict[str, int], things: Sequence[str], length: int):
        self.tokens = dict(tokens)
        self.things = tuple(things)
        self.length = length
        self._thing_words = frozenset(tokens) - {"<pad>", "on", *STYLES, *COLOURS}
        self._longest_thing = max(len(thing.split()) for thing in self.things)
        self._thing_set = frozenset(self.things)

    @classmethod
    def load(cls, path: Path = VOCABULARY_FILE) -> Vocabulary:
        table = json.loads(path.read_text(encoding="utf-8"))
        return cls(table["tokens"], tuple(table["things"]), table["length"])

    def parse(self, text: str) -> Prompt:
        """Read a prompt. Never fails on text: what cannot be used is listed in the result."""
        words = self._joined(self._words(text))
        thing: list[str] = []
        style, colour = "", ""
        unknown: list[str] = []
        surplus: list[str] = []
        unknown_colours: list[str] = []
        after_on = False
        at = 0
        while at < len(words):
            named = self._thing_at(words, at)
            word = words[at]
            if named > 1 or word in self._thing_words:  # "green apple" is a thing before green is a colour
                room = max(0, THING_WORDS - len(thing))
                thing += words[at : at + named][:room]
                surplus += words[at : at + named][room:]
                at += named
                after_on = False
                continue
            if word in STYLES and style in ("", word):
                style = word
            elif word in COLOURS and colour in ("", word):
                colour = word
            elif word in self.tokens and word != "on":
                surplus.append(word)
            elif word not in ARTICLES and word != "on":
                unknown.append(word)
                unknown_colours += [word] * after_on
            after_on = word == "on" or (after_on and word in ARTICLES)
            at += 1
        if thing:  # the model never saw a thing without a style and a background
            style, colour = style or DEFAULT_STYLE, colour or DEFAULT_COLOUR
        canonical = [style] * bool(style) + thing + ["on", colour] * bool(colour)
        ids = [self.tokens[word] for word in canonical]
        return Prompt(
            ids=tuple(ids + [0] * (self.length - len(ids))),
            style=STYLES.index(style) if style else len(STYLES),
            text=" ".join(canonical),
            unknown=tuple(dict.fromkeys(unknown)),
            surplus=tuple(dict.fromkeys(surplus)),
            unknown_colours=tuple(dict.fromkeys(unknown_colours)),
        )

    def nearest(self, word: str, count: int = 3) -> tuple[str, ...]:
        """Known things, styles and colours spelled most like `word`, best first; may be empty."""
        known = (*self.things, *sorted(self._thing_words), *STYLES, *COLOURS)
        return tuple(difflib.get_close_matches(word, tuple(dict.fromkeys(known)), n=count, cutoff=0.5))

    def complaint(self, prompt: Prompt) -> str:
        """One line a user can act on, or "" when every word was used."""
        parts = []
        for word in prompt.unknown:
            near = ", ".join(self.nearest(word))
            if word in prompt.unknown_colours:
                parts.append(f"'{word}' is no background (there are {', '.join(COLOURS)})")
            else:
                parts.append(f"'{word}' is unknown (nearest: {near})" if near else f"'{word}' is unknown and nothing is near it")
        if prompt.surplus:
            left_out = ", ".join(f"'{word}'" for word in prompt.surplus)
            parts.append(f"{left_out} left out: a prompt holds one style, {THING_WORDS} words of a thing and one background colour")
        if not parts:
            return ""
        read_as = f"read as '{prompt.text}'" if prompt.text else "nothing is left of the prompt"
        return f"{'; '.join(parts)}; {read_as}. The node 'Tiny Model Words' lists all words."

    def listing(self) -> str:
        """Everything the model knows, as text for people."""
        return "\n".join(
            (
                "A prompt reads: style thing on colour, for example 'noto cat on blue'.",
                f"Styles: {', '.join(STYLES)}",
                f"Background colours: {', '.join(COLOURS)}",
                f"Things ({len(self.things)}): {', '.join(self.things)}",
            )
        )

    def _words(self, text: str) -> list[str]:
        plain = unicodedata.normalize("NFKC", text).casefold()
        return _WORD.findall(_WEIGHT.sub("", plain))

    def _joined(self, words: list[str]) -> list[str]:
        """Undo a gap inside one word: "ice cream" → "icecream", "hot dog" → "hotdog"."""
        joined: list[str] = []
        for word in words:
            pair = joined[-1] + word if joined else ""
            if pair in self._thing_words and not (joined[-1] in self.tokens and word in self.tokens):
                joined[-1] = pair
            else:
                joined.append(word)
        return joined

    def _thing_at(self, words: list[str], at: int) -> int:
        """Number of words of the longest known thing that starts at `at`; 1 when none does."""
        for count in range(self._longest_thing, 1, -1):
            if " ".join(words[at : at + count]) in self._thing_set:
                return count
        return 1
