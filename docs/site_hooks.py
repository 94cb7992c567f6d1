"""Hooks of mkdocs: pages of the repository's root, and links out of docs/.

The pages of docs/ link to other files of the repository as `../FILE`, which works where the
repository is browsed. On the site, root pages are pages, and other files are shown by their path.
"""

import re
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("RESULTS.md", "BENCHMARKS.md", "CONTRIBUTING.md", "CHANGELOG.md")
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files, config):
    """Add the root pages."""
    for name in PAGES:
        files.append(File.generated(config, name, content=(ROOT / name).read_text()))
    return files


def on_page_markdown(markdown, page, **_):
    """Resolve links relative to the repository; fail where one leads nowhere."""
    folder = ROOT if page.file.src_uri in PAGES else ROOT / "docs"

    def replaced(match):
        image, text, path, anchor = match.groups()
        target = (folder / path).resolve()
        if not target.exists():
            raise PluginError(f"{page.file.src_uri}: the link {path} leads nowhere.")
        if target.parent == ROOT and target.name in PAGES:
            return f"[{text}]({target.name}{anchor or ''})"
        if target.parent == ROOT and target.name == "README.md":
            return f"[{text}](index.md)"
        if target.parent == ROOT / "docs" and target.is_file():
            return f"{image}[{text}]({target.name}{anchor or ''})"
        return text if text.startswith("`") else f"`{target.relative_to(ROOT)}`"

    return LINK.sub(replaced, markdown)
