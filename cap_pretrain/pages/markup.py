"""HTML by functions that escape: whatever is not `Markup` already becomes escaped text."""

import base64
import hashlib
import html
import importlib.resources
import json
from collections.abc import Iterable, Sequence
from typing import Any

from cap_pretrain import untrusted

VOID = ("img", "br", "meta", "input")  # elements without an end tag


class Markup(str):
    """Text that is HTML and is not escaped again."""

    __slots__ = ()


def markup(*content: Any) -> Markup:
    r"""Return content as HTML: `Markup` as it is, None as nothing, other values escaped.

    Lists, tuples and generators stand for their parts. Control characters and lone surrogates are
    written as escapes such as \x00.
    """
    parts: list[str] = []
    for part in content:
        if isinstance(part, Markup):
            parts.append(part)
        elif isinstance(part, Iterable) and not isinstance(part, str | bytes | dict):
            parts.append(markup(*part))
        elif part is not None:
            parts.append(html.escape(untrusted.printable(str(part), keep="\n\t")))
    return Markup("".join(parts))


def element(name: str, /, *content: Any, **attributes: Any) -> Markup:
    """Return an element with its content, as `markup`; an attribute that is None is left out.

    A final underscore of an attribute's name is dropped and others become hyphens, as in `class_`
    and `aria_label`.
    """
    written = "".join(
        f' {key.removesuffix("_").replace("_", "-")}="{markup(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    end = "" if name in VOID else f"{markup(*content)}</{name}>"
    return Markup(f"<{name}{written}>{end}")


def table(
    rows: Iterable[Iterable[Any]], classes: Sequence[str] = (), head: Sequence[Any] = ()
) -> Markup:
    """Return a table of cells, with a CSS class for each column and perhaps a row of headings.

    On a narrow screen it scrolls by itself.
    """
    names = [*classes, *[""] * 99]

    def cells(kind: str, row: Iterable[Any], **attributes: Any) -> Markup:
        pairs = zip(row, names, strict=False)
        return markup(
            element(kind, cell, class_=name or None, **attributes) for cell, name in pairs
        )

    top = element("thead", element("tr", cells("th", head, scope="col"))) if head else None
    body = [markup(element("tr", cells("td", row)), Markup("\n")) for row in rows]
    return element("div", element("table", top, element("tbody", body)), class_="scroll")


def image(data: bytes, kind: str, **attributes: Any) -> Markup:
    """Return an image of type `kind`, as image/png, that the page contains."""
    source = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    return element("img", **({"alt": ""} | attributes), src=source)


def document(
    title: str, *body: Any, style: str = "", script: str = "", data: Any = None, live: bool = False
) -> str:
    """Return a page in one file that loads nothing, whatever data it shows.

    Args:
        title: Title of the page, text.
        body: Content, as `markup`.
        style: CSS in addition to that of all pages.
        script: JavaScript, the only one that a browser may run in the page.
        data: A JSON value that the script finds in the element with id "data".
        live: Whether the script may read the page's own address again.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'"
    policy += f"; form-action 'none'; script-src 'sha256-{digest}'" if script else ""
    policy += "; connect-src 'self'" if live else ""
    head = [
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Markup(asset("cap_pretrain.pages", "page.css") + style)),
    ]
    scripts = []
    if script:
        own = Markup(json_text(data))
        scripts.append(element("script", own, type="application/json", id="data"))
        scripts.append(element("script", Markup(script)))
    inside = [element("head", head), "\n", element("body", body, scripts)]
    return f"<!DOCTYPE html>\n{element('html', inside, lang='en')}\n"


def json_text(value: Any) -> str:
    """Return a value as JSON that can stand inside a script element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def asset(package: str, name: str) -> str:
    """Return a text file of a package."""
    return importlib.resources.files(package).joinpath(name).read_text(encoding="utf-8")
