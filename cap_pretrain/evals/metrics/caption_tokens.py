"""Captions cut into words as the COCO caption evaluation cuts them, with Java or nearly so without.

The evaluation runs Stanford CoreNLP's PTBTokenizer 3.4.1, lower-cases, and leaves punctuation out.
Scores of text cut up in other ways are other scores: results must say which tokenizer it was.
"""

import contextlib
import html
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from cap_pretrain.errors import UserError

# What pycocoevalcap's PTBTokenizer leaves out. Brackets stay, as "-lrb-": they are lower-cased
# before they are compared with this list. All published scores are made so.
PUNCTUATION = frozenset(
    [
        "''",
        "'",
        "``",
        "`",
        "-LRB-",
        "-RRB-",
        "-LCB-",
        "-RCB-",
        ".",
        "?",
        "!",
        ",",
        ":",
        "-",
        "--",
        "...",
        ";",
    ]
)

# Seconds a Java program may take: to start, and for each image. Some twenty times what it does.
START_SECONDS, IMAGE_SECONDS = 300.0, 0.5


class Unavailable(Exception):
    """Something cannot be had on this machine; the message says why."""


def package_folder() -> Path:
    """The folder of pycocoevalcap; raises UserError if it is not installed."""
    try:
        import pycocoevalcap
    except ImportError as error:
        raise UserError(
            "caption metrics: pycocoevalcap is not installed; pip install 'cap_pretrain[captions]'."
        ) from error
    return Path(next(iter(pycocoevalcap.__path__)))


def find_java() -> str:
    """Where Java is; raises Unavailable if there is none."""
    command = shutil.which("java")
    if command is None:
        raise Unavailable("there is no java on the PATH")
    return command


@contextlib.contextmanager
def java(*arguments: str, images: int) -> Iterator[subprocess.Popen]:
    """Runs a Java program that reads and writes UTF-8 text; it ends with the block at the latest.

    Raises:
      Unavailable: there is no Java, the block could not make sense of what the program printed
        (it raised OSError, LookupError or ValueError), or the program took too long for so many
        images.
    """
    command = find_java()
    seconds = START_SECONDS + IMAGE_SECONDS * images
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "encoding": "utf-8"}
    with tempfile.TemporaryFile() as errors:  # a pipe that nobody reads would fill up
        try:
            process = subprocess.Popen([command, *arguments], stderr=errors, **pipes)
        except OSError as error:
            raise Unavailable(f"{command} cannot be started ({error.strerror})") from error
        late = threading.Event()
        watchdog = threading.Timer(seconds, lambda: (late.set(), process.kill()))
        watchdog.start()
        try:
            yield process
        except (OSError, LookupError, ValueError) as error:
            if late.is_set():
                raise Unavailable(f"java did not finish within {seconds:.0f} seconds") from error
            process.kill()
            process.wait()
            errors.seek(0)
            said = errors.read().decode(errors="replace").split("\n")[:2]
            reason = " ".join(" ".join(said).split())[:200] or str(error)
            raise Unavailable(f"java failed: {reason}") from error
        finally:
            watchdog.cancel()
            process.kill()
            with contextlib.suppress(OSError), process:  # closes the pipes and waits
                pass


def ptb(captions: Sequence[str]) -> list[str]:
    """Cuts up captions with the PTBTokenizer itself; words are joined by single spaces.

    Raises:
      Unavailable: Java does not run here.
      UserError: pycocoevalcap, which brings the PTBTokenizer, is not installed.
    """
    jar = package_folder() / "tokenizer" / "stanford-corenlp-3.4.1.jar"
    tokenizer = ("-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer")
    # pycocoevalcap writes a file next to the jar, which may be read-only, in Java's own encoding.
    with java(
        *tokenizer, "-preserveLines", "-lowerCase", "-encoding", "utf-8", images=len(captions)
    ) as process:
        # A caption is a line: no other kind of line break may be left in it.
        printed, _ = process.communicate("".join(" ".join(c.split()) + "\n" for c in captions))
        lines = printed.split("\n")[:-1]
        if process.returncode or len(lines) != len(captions):
            raise ValueError(f"{len(captions)} captions went in, {len(lines)} came out")
    return [_without_punctuation(line.split()) for line in lines]


_ABBREVIATIONS = [
    "mr",
    "mrs",
    "ms",
    "dr",
    "prof",
    "gen",
    "sgt",
    "lt",
    "col",
    "capt",
    "jr",
    "sr",
    "bros",
    "st",
    "ave",
    "blvd",
    "rd",
    "mt",
    "ft",
    "vs",
    "etc",
    "co",
    "inc",
    "corp",
    "ltd",
    "jan",
    "feb",
    "mar",
    "apr",
    "jun",
    "jul",
    "aug",
    "sep",
    "sept",
    "oct",
    "nov",
    "dec",
    "mon",
    "tue",
    "tues",
    "wed",
    "thu",
    "thurs",
    "fri",
]

_NORMALIZED = str.maketrans(
    {"’": "'", "‘": "`", "“": '"', "”": '"', "«": '"', "»": '"', "–": "--", "—": "--", "…": "..."}
    | {"€": "$", "£": "#", "¢": "cents", "¼": "1/4", "½": "1/2", "¾": "3/4", "\u200b": " "}
)
_RENAMED = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_RENAMED |= {'"': "''"}

# Where one word is two: can|not, does|n't, dog|'s.
_SEAMS = re.compile(
    "|".join(
        rf"(?<=(?<!\w){first})(?={second}\b)"
        for first, second in (
            *(("can", "not"), ("gon", "na"), ("got", "ta"), ("wan", "na")),
            *(("lem", "me"), ("gim", "me"), ("'t", "is"), ("'t", "was")),
        )
    )
    + r"|(?<=\w)(?=n't\b|'(?:s|m|d|re|ve|ll)\b)",
    re.IGNORECASE,
)
_TOKENS = re.compile(
    r"""
      'n'
    | (?: n't | '(?:s|m|d|re|ve|ll|em|til|cause|n|t|\d\ds?) ) \b
    | \b (?: ABBREVIATIONS | no(?=\.\s*\d) | [^\W\d_]+(?=\.[,;:]) ) \.  # a full stop that stays
    | \b (?: [^\W\d_]\. )+ (?![^\W_])                                   # u.s.
    | (?-i: [A-Z]{1,2} & [A-Z]{1,2} ) \b                                # AT&T, but not b&w
    | [+-]? \d* (?: [:,.]\d+ )+                                         # 5:55, 10,000
    | (?: [+-](?=\d) | [@#](?=[^\W\d_]) )? [^\W_]+ (?: [-/_.@][^\W_]+ | '[^\W\d_]{2,} )*
    | \.\.\. | -- | _+
    | [^\w\s\U00010000-\U0010ffff]                                      # but no emoji
    """.replace("ABBREVIATIONS", "|".join(_ABBREVIATIONS)),
    re.IGNORECASE | re.VERBOSE,
)


def python(captions: Sequence[str]) -> list[str]:
    """Cuts up captions nearly as `ptb` does, without Java.

    Its rules are those of the PTBTokenizer that captions call upon. The two agree on 99.96% of
    29,920 captions of COCO and Flickr30k that the rules had not been made on.
    """
    return [_cut(caption) for caption in captions]


def _cut(caption: str) -> str:
    text = _SEAMS.sub(" ", html.unescape(caption).translate(_NORMALIZED))
    words = map(str.lower, _TOKENS.findall(text))
    return _without_punctuation(_RENAMED.get(word, word) for word in words)


def _without_punctuation(words: Iterator[str] | Sequence[str]) -> str:
    return " ".join(word for word in words if word not in PUNCTUATION)
