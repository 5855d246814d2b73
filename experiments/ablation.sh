#!/usr/bin/env bash
# Ablation of what is our reading of GC: similarity x head x chunks of one batch of 64 source images, seed 0, with half
# of the preset's disposal steps. Arguments go to dtl.py; OUT (default runs/ablation) may hold the preset's checkpoints.
set -euo pipefail
out=${OUT:-runs/ablation} python=${PYTHON:-python} dtl=${DTL:-dtl.py}
for similarity in dot cos; do
  for head in fresh source; do
    for chunks in 2 4 8; do
      "$python" "$dtl" all --preset cifar-small --out "$out" --methods gc --dispose-steps 300 --similarity "$similarity" \
        --gc-head "$head" --chunks "$chunks" --chunk-size $((64 / chunks)) "$@" >"$out.log" 2>&1 || { cat "$out.log"; exit 1; }
      echo "$similarity $head $chunks done"
    done
  done
done
"$python" "$(dirname "$0")/ablation_table.py" "$out" >"$out/table.md"
cat "$out/table.md"
