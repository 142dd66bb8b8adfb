"""Write unicode_ranges.txt: which characters are letters, and which are numbers.

    python data/make_unicode_ranges.py /usr/share/unicode/UnicodeData.txt

bpe.py splits text by these ranges. Python's own tables are as new as Python is, and the ids of a
text must not depend on that. Debian's package `unicode-data` has the file to read. In it, a line is
a code point, its name and its general category; two lines give the ends of a large block:

    0041;LATIN CAPITAL LETTER A;Lu;…
    4E00;<CJK Ideograph, First>;Lo;…
    9FFF;<CJK Ideograph, Last>;Lo;…
"""

import sys
import textwrap
from pathlib import Path

HEADER = """\
# Letters (general categories L*) and numbers (N*) of Unicode 15.0, as hexadecimal ranges.
# Derived from UnicodeData.txt by make_unicode_ranges.py. © 1991-2022 Unicode, Inc., under the
# Unicode License: https://www.unicode.org/license.txt
"""


def read_ranges(lines: list[str]) -> dict[str, list[list[int]]]:
    """{"L": [[0x41, 0x5A], …], "N": …}, neighbours joined."""
    ranges, first = {"L": [], "N": []}, 0
    for line in lines:
        number, name, category, *_ = line.split(";")
        code = int(number, 16)
        if name.endswith(", First>"):
            first = code
            continue
        start = first if name.endswith(", Last>") else code
        if (found := ranges.get(category[0])) is None:
            continue
        if found and found[-1][1] == start - 1:
            found[-1][1] = code
        else:
            found.append([start, code])
    return ranges


def main() -> None:
    lines = Path(sys.argv[1]).read_text().splitlines()
    text = HEADER
    for name, found in read_ranges(lines).items():
        words = [f"{a:X}-{b:X}" if a < b else f"{a:X}" for a, b in found]
        wrapped = textwrap.wrap(" ".join(words), 97, break_on_hyphens=False)
        text += "".join(f"{name} {line}\n" for line in wrapped)
    Path(__file__).with_name("unicode_ranges.txt").write_text(text)


if __name__ == "__main__":
    main()
