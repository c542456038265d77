"""What a failed command says: one sentence, whoever raised it."""

import re


class UsageError(ValueError):
    """The command was asked wrongly: exit status 2."""


_WRAPPED = ("Does not validate against any of the Union", "Parser key ", "Problem with given class_path", "Key ")


def innermost(error: BaseException) -> BaseException:
    """The error that matters, of those that jsonargparse wraps in what else it might have been."""
    while error.__cause__ is not None and str(error).startswith(_WRAPPED):
        error = error.__cause__
    return error


def sentence(message: str, error: BaseException | None = None) -> str:
    """A parser's message on one line: the config key at fault, and what is wrong with it."""
    key = re.match(r'Parser key "([^"]+)":', message)
    text = " ".join(str(innermost(error) if error else message).split())
    if key is None or not error:
        return text
    return f"config key {key[1]!r}: {text}"
