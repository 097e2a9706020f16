"""Results that need not be computed again.

A node's key is its signature: class, change token, its own id where the node asks for it, and its inputs with every link
replaced by the signature of its source. Signatures are hash-consed, so a graph of n nodes costs n small tuples, equal
descriptions are the same object, and ids do not matter: nodes that say the same share a result.

Modes: `classic` keeps what the latest prompt (and the expansions of its nodes) mentions; `lru` fills up to `size` results
with older ones; `none` drops a result as soon as every node that may read it has run.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

from .graph import DynamicPrompt, links_of
from .graph_utils import is_link
from .node_face import Faces

__all__ = ["CacheSettings", "ResultCache", "UncachedResults", "make_cache", "Signature", "Signatures"]

ChangeToken = Callable[[str], Awaitable[Any]]


@dataclass(frozen=True)
class CacheSettings:
    """mode: "classic", "lru" or "none". size: results that `lru` keeps in all, but never fewer than the latest prompt's."""

    mode: str = "classic"
    size: int = 0

    def __post_init__(self) -> None:
        if self.mode not in ("classic", "lru", "none") or self.size < 0:
            raise ValueError(f"cache mode {self.mode!r} of size {self.size}; allowed: classic, none, lru:N with N of 0 or more")

    @classmethod
    def parse(cls, text: str) -> CacheSettings:
        """From "classic", "none" or "lru:100"."""
        mode, _, size = text.partition(":")
        if size and not (mode == "lru" and size.isascii() and size.isdigit()):
            raise ValueError(f"cache mode {text!r}; allowed: classic, none, lru:N with N of 0 or more")
        return cls(mode, int(size or 0))


class Signature:
    """One description, made by `Signatures` and compared by identity. It keeps the signatures it mentions alive."""

    __slots__ = ("parts", "__weakref__")

    def __init__(self, parts: tuple):
        self.parts = parts


class Signatures:
    """Makes signatures; those that no cache holds any more are forgotten."""

    def __init__(self) -> None:
        self._known: WeakValueDictionary[tuple, Signature] = WeakValueDictionary()

    def of(self, parts: tuple) -> Signature:
        signature = self._known.get(parts)
        if signature is None:
            signature = self._known[parts] = Signature(parts)
        return signature


def comparable(value: Any) -> Any:
    """A hashable stand-in that is equal for equal constants.

    NaN, and what cannot be compared by value, equals nothing, not even itself at the next look. Booleans, integers and floats
    of the same value differ, as a node may treat them differently.
    """
    try:
        return _comparable(value)
    except RecursionError:  # a constant nested hundreds of levels deep
        return object()


def _comparable(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float) and math.isnan(value):
        return object()
    if isinstance(value, (bool, int, float)):
        return (type(value), value)
    if isinstance(value, Mapping):
        return ("mapping", frozenset((_comparable(key), _comparable(item)) for key, item in value.items()))
    if isinstance(value, Sequence):
        return ("sequence", tuple(_comparable(item) for item in value))
    return object()


class SignatureKeys:
    """Signatures of the nodes of one run."""

    def __init__(self, signatures: Signatures, dynprompt: DynamicPrompt, faces: Faces, change_token: ChangeToken | None):
        self._signatures = signatures
        self._dynprompt = dynprompt
        self._faces = faces
        self._change_token = change_token
        self._keys: dict[str, Signature] = {}

    def __getitem__(self, node_id: str) -> Signature | None:
        return self._keys.get(node_id)

    def close(self) -> None:
        """Let go of the run, which holds the cache that holds this: a circle would keep its results until a collection."""
        self._change_token = None

    async def add(self, node_ids: Iterable[str]) -> list[Signature]:
        """Make the signatures of these nodes, their ancestors first. A link into nothing or around a circle never equals anything."""
        node_ids = list(node_ids)
        open_nodes: set[str] = set()
        stack = node_ids[::-1]
        while stack:
            node_id = stack[-1]
            if node_id in self._keys:
                stack.pop()
                continue
            links = links_of(self._dynprompt.get_node(node_id))
            waiting = [link[0] for _, link in links if self._must_wait_for(link[0], open_nodes)]
            if waiting:
                open_nodes.add(node_id)
                stack.extend(waiting)
                continue
            stack.pop()
            open_nodes.discard(node_id)
            self._keys[node_id] = await self._describe(node_id)
        return [self._keys[node_id] for node_id in node_ids]

    def _must_wait_for(self, source: str, open_nodes: set[str]) -> bool:
        return source not in self._keys and source not in open_nodes and self._dynprompt.has_node(source)

    async def _describe(self, node_id: str) -> Signature:
        node = self._dynprompt.get_node(node_id)
        try:
            face = self._faces[node["class_type"]]
        except Exception:  # a node that is not part of this run may have a class that cannot be read
            return Signature((object(),))
        token = comparable(await self._change_token(node_id)) if face.has_change_token else None
        parts: list[Any] = [face.class_type, token, node_id if face.keyed_by_id else None]
        inputs = node["inputs"]
        for name in sorted(inputs):
            value = inputs[name]
            if is_link(value):
                parts += (name, self._keys.get(value[0]) or object(), value[1])
            else:
                parts += (name, comparable(value))
        return self._signatures.of(tuple(parts))


@dataclass
class Entry:
    """What a node produced: its outputs (a list of values per output; None while an expansion is still running) and its ui."""

    outputs: list[list] | None = None
    ui: dict[str, list] | None = None


@dataclass
class _Scope:
    """The keys of the prompt's own nodes or of one expansion, and the expansions of those nodes by (id, class)."""

    keys: list[Signature] = field(default_factory=list)
    expansions: dict[tuple[str, str], _Scope] = field(default_factory=dict)

    def all_keys(self) -> Iterator[Signature]:
        stack = [self]
        while stack:
            scope = stack.pop()
            yield from scope.keys
            stack.extend(scope.expansions.values())


class ResultCache:
    """Results by signature: `classic`, or `lru` where a size is given.

    A result that the latest prompt mentions, itself or through an expansion of one of its nodes, is always kept.

    Args:
        size: how many results are kept in all; those that are not mentioned any more go first, the longest unmentioned first.
    """

    def __init__(self, size: int = 0):
        self.size = size
        self._signatures = Signatures()
        self._dynprompt = DynamicPrompt({})
        self._keys: SignatureKeys | None = None
        self.clear()

    def clear(self) -> None:
        self._root = _Scope()
        self._mentions: dict[Signature, int] = {}
        self._entries: dict[Signature, Entry] = {}
        self._unmentioned: dict[Signature, Entry] = {}  # oldest first

    async def begin(self, dynprompt: DynamicPrompt, faces: Faces, change_token: ChangeToken, outputs: Iterable[str]) -> None:
        """Key every node of a new prompt and drop what no longer has a place."""
        self._dynprompt = dynprompt
        self._keys = SignatureKeys(self._signatures, dynprompt, faces, change_token)
        present = {(node_id, node["class_type"]) for node_id, node in dynprompt.original_prompt.items()}
        previous = self._root
        kept = {name: scope for name, scope in previous.expansions.items() if name in present}
        self._root = _Scope(await self._keys.add(dynprompt.original_prompt), kept)
        self._mention(self._root.keys)
        self._release(previous.keys)
        for name, scope in previous.expansions.items():
            if name not in present:
                self._release(scope.all_keys())
        self._trim()

    async def expand(self, parent_id: str, children: Sequence[str]) -> None:
        """Key the nodes that an expansion added to the graph."""
        scope = self._scope_of(parent_id)
        inner = {self._name(child) for child in children}
        previous = scope.expansions.get(self._name(parent_id), _Scope())
        kept = {name: deeper for name, deeper in previous.expansions.items() if name in inner}
        renewed = scope.expansions[self._name(parent_id)] = _Scope(await self._keys.add(children), kept)
        self._mention(renewed.keys)
        self._release(previous.keys)
        for name, deeper in previous.expansions.items():
            if name not in inner:
                self._release(deeper.all_keys())
        self._trim()

    def get(self, node_id: str) -> list[list] | None:
        """Outputs of a node that need not run, else None."""
        entry = self._entries.get(self._keys[node_id])
        return entry.outputs if entry is not None else None

    def get_ui(self, node_id: str) -> dict[str, list] | None:
        entry = self._entries.get(self._keys[node_id])
        return entry.ui if entry is not None else None

    def put(self, node_id: str, outputs: list[list]) -> None:
        self._entries.setdefault(self._keys[node_id], Entry()).outputs = outputs

    def put_ui(self, node_id: str, ui: dict[str, list]) -> None:
        self._entries.setdefault(self._keys[node_id], Entry()).ui = ui

    def completed(self, node_id: str) -> None:
        """A node has run and its results were put."""

    def finish(self) -> None:
        """The run is over; half-made entries (an expansion that failed) go."""
        for key in [key for key, entry in self._entries.items() if entry.outputs is None]:
            del self._entries[key]
        if self._keys is not None:
            self._keys.close()

    def _mention(self, keys: Iterable[Signature]) -> None:
        for key in keys:
            self._mentions[key] = self._mentions.get(key, 0) + 1
            entry = self._unmentioned.pop(key, None)
            if entry is not None:
                self._entries[key] = entry

    def _release(self, keys: Iterable[Signature]) -> None:
        for key in keys:
            self._mentions[key] -= 1
            if self._mentions[key] == 0:
                del self._mentions[key]
                entry = self._entries.pop(key, None)
                if entry is not None:
                    self._unmentioned[key] = entry

    def _trim(self) -> None:
        while self._unmentioned and len(self._entries) + len(self._unmentioned) > self.size:
            del self._unmentioned[next(iter(self._unmentioned))]

    def _name(self, node_id: str) -> tuple[str, str]:
        return node_id, self._dynprompt.get_node(node_id)["class_type"]

    def _scope_of(self, node_id: str) -> _Scope:
        """The scope that this node was added to."""
        lineage = []
        while (parent := self._dynprompt.get_parent_node_id(node_id)) is not None:
            lineage.append(parent)
            node_id = parent
        scope = self._root
        for parent in reversed(lineage):
            scope = scope.expansions[self._name(parent)]
        return scope


class UncachedResults:
    """`none`: results live only until every node that links to them, now or behind a lazy input, has run."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._readers: dict[str, set[str]] = {}
        self._children: dict[str, Sequence[str]] = {}
        self._dynprompt = DynamicPrompt({})

    async def begin(self, dynprompt: DynamicPrompt, faces: Faces, change_token: ChangeToken, outputs: Iterable[str]) -> None:
        self.clear()
        self._dynprompt = dynprompt
        stack, seen = list(outputs), set()
        while stack:
            node_id = stack.pop()
            if node_id not in seen and dynprompt.has_node(node_id):
                seen.add(node_id)
                stack.extend(self._note_reader(node_id))

    async def expand(self, parent_id: str, children: Sequence[str]) -> None:
        self._children[parent_id] = children
        for child in children:
            self._note_reader(child)
            self._readers.setdefault(child, set()).add(parent_id)

    def get(self, node_id: str) -> list[list] | None:
        entry = self._entries.get(node_id)
        return entry.outputs if entry is not None else None

    def get_ui(self, node_id: str) -> dict[str, list] | None:
        entry = self._entries.get(node_id)
        return entry.ui if entry is not None else None

    def put(self, node_id: str, outputs: list[list]) -> None:
        self._entries.setdefault(node_id, Entry()).outputs = outputs

    def put_ui(self, node_id: str, ui: dict[str, list]) -> None:
        self._entries.setdefault(node_id, Entry()).ui = ui

    def completed(self, node_id: str) -> None:
        sources = [link[0] for _, link in links_of(self._dynprompt.get_node(node_id))]
        for source in {*sources, *self._children.pop(node_id, ())}:
            readers = self._readers.get(source, set())
            readers.discard(node_id)
            if not readers and source in self._entries:
                self._entries[source].outputs = None  # the ui stays for the history of the run

    def finish(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._entries.clear()
        self._readers.clear()
        self._children.clear()

    def _note_reader(self, node_id: str) -> list[str]:
        sources = [link[0] for _, link in links_of(self._dynprompt.get_node(node_id))]
        for source in sources:
            self._readers.setdefault(source, set()).add(node_id)
        return sources


def make_cache(settings: CacheSettings) -> ResultCache | UncachedResults:
    return UncachedResults() if settings.mode == "none" else ResultCache(settings.size if settings.mode == "lru" else 0)
