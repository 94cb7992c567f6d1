"""Documentation of config fields and options, as the comments and docstrings of their source say.

A field is documented by the comment after it, or by the comment above it, which also covers fields
that follow without a comment; an option of a dataclass likewise, or in "Attributes:".
"""

import ast
import dataclasses
import difflib
import functools
import inspect
import io
import itertools
import re
import textwrap
import tokenize
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from cap_pretrain import config as configs
from cap_pretrain import evals, learners
from cap_pretrain.data.scenes.source import ScenesOptions
from cap_pretrain.data.text.words import Rules
from cap_pretrain.optim import optimizers
from cap_pretrain.optim.muon import Muon
from cap_pretrain.optim.mup import Mup
from cap_pretrain.optim.plateau import Plateau

SECTIONS = {
    "plateau": Plateau,
    "data.scenes": ScenesOptions,
    "optim.muon": Muon,
    "optim.mup": Mup,
    "text.words": Rules,
}
"""Sections of the config whose fields are those of a dataclass."""


class Entry(NamedTuple):
    """Fields that one text documents: their defaults by name, and the text."""

    fields: dict[str, Any]
    text: str


class Section(NamedTuple):
    """Entries under a heading, as the options of a learner; `name` is its prefix, "" for none."""

    name: str
    heading: str
    entries: list[Entry]

    def below(self, prefix: str) -> "Section":
        """Return the part of the section that documents `prefix`, or fields below it."""
        if self.name == prefix or self.name.startswith(f"{prefix}."):
            return self

        def concerns(entry: Entry) -> bool:
            return any(name == prefix or name.startswith(f"{prefix}.") for name in entry.fields)

        return self._replace(entries=list(filter(concerns, self.entries)))


def found(prefix: str) -> list[Section]:
    """Return what documents a field, a section, or an evaluator or a learner with its options.

    "" is all of the default config; a prefix that is none of these finds names that contain it.
    """
    prefix = re.sub(r"^learner\.parts\.\w+\.", "learner.", prefix)  # of a part, as of a learner
    group, _, rest = prefix.partition(".")
    named = {"learner": (learners.REGISTRY, of_learner), "evals": (evals.REGISTRY, of_evaluator)}
    if group in named and rest:
        registry, document = named[group]
        name = rest.partition(".")[0]
        if name in registry:
            section = document(name)
            return [section.below(prefix)] if section.below(prefix).entries else []
        every = [document(name) for name in registry]  # an option of some of them
        return [part for section in every if (part := section.below(prefix)).entries]
    if group in named:
        return [Section(group, "", [])] if prefix == group else []
    whole = of_config()
    part = whole.below(prefix) if prefix else whole
    if part.entries or not prefix:
        return [part]
    everything = [whole, *map(of_learner, learners.REGISTRY), *map(of_evaluator, evals.REGISTRY)]
    matching = []
    for section in everything:
        entries = [e for e in section.entries if any(prefix in field for field in e.fields)]
        if entries:
            matching.append(section._replace(entries=entries))
    return matching


def no_field(prefix: str) -> str:
    """Return the message for a prefix for which `found` finds nothing."""
    sections = [of_config(), *map(of_learner, learners.REGISTRY)]
    sections += map(of_evaluator, evals.REGISTRY)
    known = {field for section in sections for entry in section.entries for field in entry.fields}
    last = {name.rpartition(".")[2]: name for name in known}
    near = difflib.get_close_matches(prefix, known, n=1)
    near = near or [last[name] for name in difflib.get_close_matches(prefix, last, n=1)]
    hint = f" Did you mean {near[0]!r}?" if near else " `cap fields` lists all of them."
    return f"{prefix}: no config field has a name like this.{hint}"


def where(given: Iterable[str], config: ConfigDict) -> str:
    """Return a hint where the first of the fields `given` is that a config does not have.

    " The field is data.image_size." for "image_size"; "" if nothing of that name is known.
    """
    known = configs.fields(config.to_dict())
    sections = {name.rpartition(".")[0] for name in known}
    missing = [name for name in given if name not in known and name not in sections]
    if not missing:
        return ""
    group, _, rest = missing[0].partition(".")
    last = missing[0].rpartition(".")[2]
    evaluator = rest.partition(".")[0]
    if group == "evals" and evaluator not in config.evals:
        return f" This config has the evaluators {', '.join(config.evals) or '(none)'}."
    if same := [name for name in known if name.rpartition(".")[2] == last]:
        return f" The field is {' or '.join(sorted(same, key=len)[:3])}."
    others = [name for name in learners.REGISTRY if last in learners.defaults(name)]
    if group == "learner" and others:
        return f" {last} is an option of {', '.join(others)}, not of {config.learner.name}."
    return ""


@functools.cache
def of_config() -> Section:
    """Return the documentation of all fields of the default config, except options of others."""
    default = configs.fields(configs.default().to_dict())
    body = ast.parse(inspect.getsource(configs)).body
    tree = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
    comments = _comments(inspect.getsource(configs))
    entries = []
    for names, text in _of_function(tree, "default", comments):
        fields: dict[str, Any] = {}
        for name in names:
            below = {k: v for k, v in default.items() if k == name or k.startswith(f"{name}.")}
            fields |= below
        if names[0] in SECTIONS:
            entries += of_dataclass(SECTIONS[names[0]], f"{names[0]}.", text)
        elif names[0] not in ("learner", "evals"):
            entries.append(Entry(fields, text))
    return Section("", "", entries)


@functools.cache
def of_learner(name: str) -> Section:
    """Return the documentation of a learner and its options."""
    return _of_class("learner", name, learners.learner_class(name), "learner.")


@functools.cache
def of_evaluator(name: str) -> Section:
    """Return the documentation of an evaluator and its options, an entry of `config.evals`."""
    return _of_class("evals", name, evals.evaluator_class(name), f"evals.{name}.")


def of_optimizers() -> dict[str, str]:
    """Return what each value of `optim.name` means."""
    found = {}
    for name, optimizer in optimizers.OPTIMIZERS.items():
        doc = optimizer.before.__doc__ or optimizer.after.__doc__
        found[name] = _summary(doc).removeprefix("Return ")
    return found


def purpose(kind: Callable[..., Any]) -> str:
    """Return the first sentence of a docstring, or of its module's if it has none."""
    doc = vars(kind).get("__doc__") or inspect.getmodule(kind).__doc__
    return _summary(doc)


def of_dataclass(cls: type, prefix: str, text: str = "") -> list[Entry]:
    """Return the documentation of the fields of a dataclass, those of its bases first."""
    entries = [Entry({}, text)] if text else []
    left = {field.name: _default(field) for field in dataclasses.fields(cls)}
    parts = [part for part in cls.__mro__ if dataclasses.is_dataclass(part)]
    found: list[list[Entry]] = []
    for part in parts:  # a class before its bases, whose defaults it may replace
        prose, attributes = _split_docstring(part.__doc__ or "")
        source = textwrap.dedent(inspect.getsource(part))
        body = ast.parse(source).body[0]
        own = []
        for names, comment in _groups(body, _comments(source)):  # type: ignore[arg-type]
            for name in names:
                if name in vars(part).get("__annotations__", {}) and name in left:
                    said = attributes.get(name, "") or comment or prose
                    own.append(Entry({prefix + name: left.pop(name)}, said))
        found.append(own)
    entries += itertools.chain.from_iterable(reversed(found))
    return list(_merged(entries))


def _of_class(section: str, name: str, cls: Any, prefix: str) -> Section:
    entries = of_dataclass(cls.Options, prefix)
    if section == "evals":
        when = 'When it runs: "always", at every evaluation, or "end", at the end of the run.'
        entries.append(Entry({f"{prefix}when": "always"}, when))
    return Section(f"{section}.{name}", f"{name}: {purpose(cls)}", entries)


def _merged(entries: Iterable[Entry]) -> Iterator[Entry]:
    """Join neighbors of the same text."""
    for text, group in itertools.groupby(entries, lambda entry: entry.text):
        yield Entry({k: v for entry in group for k, v in entry.fields.items()}, text)


def _of_function(
    tree: dict[str, Any], function: str, comments: dict[int, tuple[str, bool]], prefix: str = ""
) -> Iterator[tuple[list[str], str]]:
    """Yield (names, text) of the fields that a function sets, with those of functions it calls."""
    called = {}
    for node in tree[function].body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            called[_target(node)] = ast.unparse(node.value)
    for names, text in _groups(tree[function], comments):
        own = [name for name in names if not called.get(name, "").endswith("()")]
        if own:
            yield [prefix + name for name in own], text
        for name in names:
            if (inner := called.get(name, "").removesuffix("()")) in tree:
                yield from _of_function(tree, inner, comments, f"{prefix}{name}.")


def _groups(
    body: ast.FunctionDef | ast.ClassDef, comments: dict[int, tuple[str, bool]]
) -> Iterator[tuple[list[str], str]]:
    """Yield (names, text) of assignments; a comment above covers those below without one."""
    names: list[str] = []
    text, last = "", -1
    for node in body.body:
        name = _target(node)
        if not name:
            continue
        start, end = node.lineno, node.end_lineno or node.lineno
        above: list[str] = []
        while comments.get(start - len(above) - 1, ("", False))[1]:
            above.append(comments[start - len(above) - 1][0])
        beside = [comments[k][0] for k in range(start, end + 1) if k in comments]
        said = " ".join([*reversed(above), *beside])
        if said or last != start - 1 or not text:
            if names:
                yield names, text
            names, text = [], said
        names.append(name)
        last = -1 if beside and not above else end
    if names:
        yield names, text


def _target(node: ast.AST) -> str:
    """Return the name of an assignment, "a.b" for `c.a.b = …`, or ""."""
    if isinstance(node, ast.Assign) and len(node.targets) == 1:
        target = ast.unparse(node.targets[0])
        return "" if target == "c" else target.removeprefix("c.")
    return ast.unparse(node.target) if isinstance(node, ast.AnnAssign) else ""


@functools.lru_cache(maxsize=64)
def _comments(source: str) -> dict[int, tuple[str, bool]]:
    """Return the comments of a source by line: the text, and whether it has a line for itself."""
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            alone = not token.line[: token.start[1]].strip()
            found[token.start[0]] = (token.string.lstrip("# "), alone)
    return found


def _split_docstring(doc: str) -> tuple[str, dict[str, str]]:
    """Return the prose of a docstring, and its "Attributes:" by name."""
    text, _, listed = inspect.cleandoc(doc).partition("Attributes:\n")
    attributes = {}
    for item in re.split(r"\n(?=    \w)", "\n" + listed.rstrip()):
        name, colon, said = item.strip().partition(":")
        if colon:
            attributes[name] = " ".join(said.split())
    return " ".join(text.split()), attributes


def _summary(doc: str | None) -> str:
    first = inspect.cleandoc(doc or "").partition("\n\n")[0]
    return " ".join(first.split()).rstrip(".")


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default
