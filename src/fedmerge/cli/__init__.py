"""The command line: thin commands over the public API, and the only room that prints."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence

from fedmerge.cli.arguments import parser_of
from fedmerge.cli.catalogue import markdown_of
from fedmerge.cli.screen import err, escape
from fedmerge.core.errors import FedmergeError, UsageError
from fedmerge.core.text import brief, printable


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_visible)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", handlers=[handler])
    try:
        _refuse_undecoded(words)
        options = parser_of(words).parse_intermixed_args(words)
        command: Callable[[argparse.Namespace], None] = options.command
        command(options)
    except UsageError as error:
        return _complain(error, 2)
    except FedmergeError as error:
        return _complain(error, 1)
    except KeyboardInterrupt:
        err.print("interrupted; what was finished so far is kept")
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except (OSError, MemoryError) as error:  # a full disk, a lost folder, too little memory
        return _complain(FedmergeError(_lack_of(error)), 1)
    return 0


def _lack_of(error: OSError | MemoryError) -> str:
    if isinstance(error, MemoryError):
        return f"not enough memory: {str(error) or 'take fewer clients or a smaller network'}"
    return f"cannot read or write {error.filename or 'a file'}: {error.strerror}"


def _visible(record: logging.LogRecord) -> bool:
    """Lets every record pass, with its control characters written as escapes."""
    record.msg, record.args = printable(record.getMessage(), keep="\n"), None
    return True


def _refuse_undecoded(words: Sequence[str]) -> None:
    for word in words:
        if not word.isprintable() and any(0xD800 <= ord(letter) < 0xE000 for letter in word):
            raise UsageError(f"got {word!a}, which is not a text in this system's encoding; expected UTF-8")
        if "\0" in word:
            raise UsageError(f"got {brief(word)}, which no argument can hold; leave the null character out")


def _complain(error: FedmergeError, code: int) -> int:
    err.print(f"[bold red]error:[/] {escape(str(error))}")
    return code


__all__ = ["main", "markdown_of"]
