# SPDX-License-Identifier: Apache-2.0
"""Writes docs/operators.md from the schemas in csrc/ops.cpp and the docstrings of the specification.

python docs/write_operators.py
"""

import inspect
import re
import textwrap
from pathlib import Path

from fixed_size_kv_cache import reference

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/operators.md"
HEAD = """\
# The operators

`import fixed_size_kv_cache` loads them as `torch.ops.fsdc`. This page is written by `docs/write_operators.py` from the
schemas in `csrc/ops.cpp` and the docstrings in
[reference.py](../python/fixed_size_kv_cache/operators/reference.py), the specification in plain torch. Kernels match it
bit for bit, but for the sums of attention, see there. In C++ they have the same names, in `csrc/fsdc.h`.

`B` batch, `H` KV heads, `G` query heads per KV head, `Hq = H * G`, `Q` new queries, `S` tokens seen, `N` slots of a KV
head, `D` head dimension, `Dv` that of values.
"""


def schemas() -> dict[str, str]:
    """The schema of each operator, by name."""
    source = (ROOT / "csrc/ops.cpp").read_text()
    found = {}
    for definition in re.findall(r"m\.def\((.*?)\);", source, re.DOTALL):
        schema = "".join(re.findall(r'"(.*?)"', definition))
        found[schema.split("(")[0]] = schema
    return found


def section(name: str, schema: str) -> str:
    text = re.sub(r":func:`(\w+)`", r"`\1`", inspect.getdoc(getattr(reference, name)).replace("``", "`"))
    call, output = schema.split(" -> ")
    call = textwrap.wrap(call, 119, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    lines = [f"## {name}", "", "```", *call, f"    -> {output}", "```", ""]
    part = None
    for line in text.splitlines():
        if heading := re.fullmatch(r"(Args|Returns|Raises|Example):", line):
            part = heading[1]
            lines += [f"**{part}**", ""] + (["```python"] if part == "Example" else [])
        elif part and line and not line.startswith(" "):
            part = None  # the text goes on
            lines.append(line)
        elif part == "Example":
            lines.append(line[4:] if line else "```\n")
        elif part == "Args" and (argument := re.fullmatch(r"    (\w+): (.*)", line)):
            lines.append(f"* `{argument[1]}`: {argument[2]}")
        elif part == "Args" and line:
            lines.append("  " + line.strip())
        else:
            lines.append(line.strip())
    return "\n".join(lines)


def page() -> str:
    return "\n".join([HEAD, *(section(name, schema) + "\n" for name, schema in schemas().items())])


if __name__ == "__main__":
    PAGE.write_text(page())
