"""Print the ablation's table from what its runs left in a folder: python experiments/ablation_table.py OUT"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dtl
import dtl_report

out = Path(sys.argv[1])
lines, runs = [], [json.loads(path.read_text()) for path in out.glob("run-*.json")]
runs.sort(key=lambda run: (run["settings"]["similarity"] != "dot", run["settings"]["gc_head"], run["settings"]["chunks"]))
for run in runs:
    settings, rows = run["settings"], dtl_report.summarise(dtl.Results(out).read(run["config_hash"]), dtl.REPORTED)
    if "disposed:gc" not in rows:
        continue
    gc = {column: values[0] for column, values in rows["disposed:gc"].items()}
    cells = [settings["similarity"], settings["gc_head"], f"{settings['chunks']} x {settings['chunk_size']}"]
    cells += [f"{100 * gc['target_accuracy']:.1f}", f"{100 * gc['change']:+.1f}", f"{100 * gc['source_accuracy']:.1f}"]
    for task in dtl.PIGGYBACK_TASKS:
        cells += [f"{100 * gc['fixed pl ' + task]:.1f}", f"{gc['fixed leak ' + task]:.2f}"]
    lines.append("| " + " | ".join(cells) + " |")
head = "similarity | head | chunks | target acc. % | change | source acc. %"
head += "".join(f" | PL {task} % | leak" for task in dtl.PIGGYBACK_TASKS)
print(f"| {head} |\n" + "|---" * 10 + "|\n" + "\n".join(lines))
print(f"\nSeed 0, {run['settings']['dispose_steps']} disposal steps, weights {run['settings']['forget_weights']}, "
      f"revision {run['revision']}, torch {run['versions']['torch']}, {run['versions']['device']}.")
