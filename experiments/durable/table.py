"""Print the trials as a table: python experiments/durable/table.py > experiments/durable/table.md"""

import json
from pathlib import Path

COLUMNS = ("target", "source-subset fixed", "source-subset long", "downstream fixed", "downstream long")
print("| trial | attacks | " + " | ".join(COLUMNS) + " |\n" + "|---" * (2 + len(COLUMNS)) + "|")
for line in (Path(__file__).parent / "trials.jsonl").read_text().splitlines():
    row = json.loads(line)
    print(f"| {row['trial'].removesuffix(' seed 0')} | {row.get('attacks', 1)} | " + " | ".join(
        f"{100 * row[c]:.1f}" if c in row else "-" for c in COLUMNS) + " |")
