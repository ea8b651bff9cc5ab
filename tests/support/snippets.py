"""The Python examples of README.md and docs/, except those marked <!-- not run -->."""

import re

BLOCK = re.compile(
    r"(?:<!-- (?P<mark>not run|2 ranks) -->\s*)?^```python\n(?P<code>.*?)^```$", flags=re.DOTALL | re.MULTILINE
)


def examples(text):
    """(line of the fence, code, ranks) of every block that is to run; those marked <!-- 2 ranks --> run on two."""
    for match in BLOCK.finditer(text):
        if match["mark"] != "not run":
            yield text.count("\n", 0, match.start()) + 1, match["code"], 2 if match["mark"] else 1
