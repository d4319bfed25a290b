"""Shows an example at the end of a docstring as code, not as a quotation. mkdocstrings calls it per docstring."""

import re

from griffe import Extension

EXAMPLE = re.compile(r"(?m)^>>> .*(?:\n(?!\n).+)*")


def fenced(docstring: str) -> str:
    """Returns a docstring whose examples that are not indented stand in code blocks.

    An indented example is code in Markdown already.
    """
    return EXAMPLE.sub(lambda found: f"```pycon\n{found[0]}\n```", docstring)


class Doctests(Extension):
    """Marks examples as code before a docstring is read for its sections."""

    def on_instance(self, *, obj, **_):
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
