"""What a failed command says: one sentence, whoever raised it."""

import re
import sys
from dataclasses import fields, is_dataclass


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
    return f"config key {key[1]!r}: {_plain(text, key[1].rpartition('.')[2])}"


_PLAIN = (
    (r"Expected a typing\.Literal\[(.*)\]\. Got value: (.*)", r"must be one of \1, got \2"),
    (r"Expected a <class '(?:tuple|list)'>\. Got value: (.*)", r"must be a list, as [\1] is, got \1"),
    (r"Expected a <class 'dict'>\. Got value: (.*)", r"takes keys of its own, each with a value, got \1"),
    (
        r"Not a valid subclass of \w+\. Got value: (.*?) Subclass .*",
        r"takes keys of its own, each with a value, got \1",
    ),
    (r"Expected a <class 'int'>\. Got value: (.*)", r"must be a whole number, got \1"),
    (r"Expected a <class 'float'>\. Got value: (.*)", r"must be a number, got \1"),
    (r"Expected a <class 'bool'>\. Got value: (.*)", r"must be true or false, got \1"),
    (r"Expected a <class 'str'>\. Got value: (.*)", r"must be a text, got \1"),
    (r"unrecognized arguments: --([\w.]+).*", r"its class_path takes no \1: leave it out"),
    (r".* Subtypes: \[list\[.*Given value: (.*)", r"must be a list of mappings, got \1"),
)
"""What jsonargparse says of a value of another type, and the same in the words of a config."""


def _plain(text: str, name: str) -> str:
    """What is wrong with the value of the key `name`; as it is where nothing plainer is known."""
    text = re.sub(r"^(- )?Expected a path but .*? either not accessible or invalid - ", "", text)
    if found := re.search(r"Subtypes: \[<class '([\w.]+)\.(\w+)'>.*Given value: (.*)", text):
        kind = getattr(sys.modules.get(found[1]), found[2], None)
        if not is_dataclass(kind):
            return f"must give a class_path, with init_args, got {found[3]}"
        return f"takes keys of its own ({', '.join(f'{name}.{key.name}' for key in fields(kind))}), got {found[3]}"
    for pattern, plain in _PLAIN:
        if found := re.fullmatch(pattern, text):
            return found.expand(plain)
    return text
