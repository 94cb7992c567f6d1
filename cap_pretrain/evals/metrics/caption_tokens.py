"""Tokenization of captions as in the COCO caption evaluation: with Java, or approximately without.

The evaluation runs Stanford CoreNLP's PTBTokenizer 3.4.1, lower-cases the text, and removes
punctuation. Scores with different tokenizers are not comparable, so results record the tokenizer.
"""

import contextlib
import html
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from cap_pretrain.errors import UserError

# What pycocoevalcap's PTBTokenizer removes. Brackets stay, as "-lrb-", because they are lower-cased
# before the comparison with this list; all published scores are computed like this.
PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-"]
    + [".", "?", "!", ",", ":", "-", "--", "...", ";"]
)

# Time limit of a Java program: to start, and for each image. Some twenty times what it takes.
START_SECONDS, IMAGE_SECONDS = 300.0, 0.5


class UnavailableError(Exception):
    """A program cannot be used on this machine; the message says why."""


def package_folder() -> Path:
    """Return the folder of pycocoevalcap; raises UserError if it is not installed."""
    try:
        import pycocoevalcap
    except ImportError as error:
        raise UserError(
            "caption metrics: pycocoevalcap is not installed; pip install 'cap_pretrain[captions]'."
        ) from error
    return Path(next(iter(pycocoevalcap.__path__)))


def find_java() -> str:
    """Return the path of Java; raises UnavailableError if there is no `java` on the PATH."""
    command = shutil.which("java")
    if command is None:
        raise UnavailableError("there is no java on the PATH")
    return command


@contextlib.contextmanager
def java(*arguments: str, images: int) -> Iterator[subprocess.Popen]:
    """Run a Java program that reads and writes UTF-8 text; it is killed at the end of the block.

    The number of `images` sets the time limit. Raises UnavailableError if there is no Java, the
    program exceeded the time limit, or the block could not parse its output, that is, raised
    OSError, LookupError or ValueError.
    """
    command = find_java()
    seconds = START_SECONDS + IMAGE_SECONDS * images
    with tempfile.TemporaryFile() as errors:  # an unread pipe would fill up
        try:
            process = subprocess.Popen(
                [command, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                encoding="utf-8",
            )
        except OSError as error:
            raise UnavailableError(f"{command} cannot be started ({error.strerror})") from error
        late = threading.Event()

        def time_out():
            late.set()
            process.kill()

        watchdog = threading.Timer(seconds, time_out)
        watchdog.start()
        try:
            yield process
        except (OSError, LookupError, ValueError) as error:
            if late.is_set():
                raise UnavailableError(
                    f"java did not finish within {seconds:.0f} seconds"
                ) from error
            process.kill()
            process.wait()
            errors.seek(0)
            printed = errors.read().decode(errors="replace").split("\n")[:2]
            reason = " ".join(" ".join(printed).split())[:200] or str(error)
            raise UnavailableError(f"java failed: {reason}") from error
        finally:
            watchdog.cancel()
            process.kill()
            with contextlib.suppress(OSError), process:  # closes the pipes and waits
                pass


def ptb(captions: Sequence[str]) -> list[str]:
    """Tokenize captions with the PTBTokenizer; words are joined by single spaces.

    Raises UnavailableError if Java does not run here, and UserError if pycocoevalcap, which
    contains the PTBTokenizer, is not installed.
    """
    jar = package_folder() / "tokenizer" / "stanford-corenlp-3.4.1.jar"
    tokenizer = ("-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer")
    # Run here, since pycocoevalcap writes a file next to the jar, which may be read-only, in Java's
    # default encoding.
    with java(
        *tokenizer, "-preserveLines", "-lowerCase", "-encoding", "utf-8", images=len(captions)
    ) as process:
        # A caption is a line, so it must not contain line breaks of any kind.
        printed, _ = process.communicate("".join(" ".join(c.split()) + "\n" for c in captions))
        lines = printed.split("\n")[:-1]
        if process.returncode or len(lines) != len(captions):
            raise ValueError(f"{len(captions)} captions went in, {len(lines)} came out")
    return [_without_punctuation(line.split()) for line in lines]


_ABBREVIATIONS = [
    "mr", "mrs", "ms", "dr", "prof", "gen", "sgt", "lt", "col", "capt", "jr", "sr", "bros", "st",
    "ave", "blvd", "rd", "mt", "ft", "vs", "etc", "co", "inc", "corp", "ltd", "jan", "feb", "mar",
    "apr", "jun", "jul", "aug", "sep", "sept", "oct", "nov", "dec", "mon", "tue", "tues", "wed",
    "thu", "thurs", "fri"
]  # fmt: skip

_NORMALIZED = str.maketrans(
    {"’": "'", "‘": "`", "“": '"', "”": '"', "«": '"', "»": '"', "–": "--", "—": "--", "…": "..."}
    | {"€": "$", "£": "#", "¢": "cents", "¼": "1/4", "½": "1/2", "¾": "3/4", "\u200b": " "}
)
_RENAMED = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_RENAMED |= {'"': "''"}

# Boundaries within words that become two tokens: can|not, does|n't, dog|'s.
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
    """Tokenize captions approximately as `ptb` does, without Java.

    The rules are those of the PTBTokenizer that matter for captions. The two agree on 99.96% of
    29,920 captions of COCO and Flickr30k that were not used in writing the rules.
    """
    return [_tokenize(caption) for caption in captions]


def _tokenize(caption: str) -> str:
    text = _SEAMS.sub(" ", html.unescape(caption).translate(_NORMALIZED))
    words = map(str.lower, _TOKENS.findall(text))
    return _without_punctuation(_RENAMED.get(word, word) for word in words)


def _without_punctuation(words: Iterable[str]) -> str:
    return " ".join(word for word in words if word not in PUNCTUATION)
