"""Copy what the runs wrote into the README, between `<!-- table FILE -->` or `<!-- text FILE -->` and `<!-- end -->`."""

import re
from pathlib import Path

root = Path(__file__).resolve().parents[1]


def fill(match: re.Match) -> str:
    text = (root / match[2]).read_text().strip()
    text = f"```\n{text}\n```" if match[2].endswith(".txt") else text
    return f"<!-- {match[1]} {match[2]} -->\n{text}\n<!-- end -->"


readme = root / "README.md"
readme.write_text(re.sub(r"<!-- (table|text) (\S+) -->\n.*?<!-- end -->", fill, readme.read_text(), flags=re.S))
