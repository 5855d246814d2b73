#!/bin/bash
# What of GC is our reading, tried one by one on the demo's pair: validation images, two new seeds.
#
#     bash experiments/ablation.sh          # a table each in runs/ablation/*/report.md
cd "$(dirname "$0")/.." || exit 1
export OMP_NUM_THREADS=1
variant() { # NAME METHODS OPTIONS...; beside the first one only `gc` differs
    out=runs/ablation/$1
    if [ "$1" != plain ]; then
        for seed in 30 31; do
            mkdir -p "$out/seed$seed"
            cp -n runs/ablation/plain/seed$seed/{pretrained,transferred,scratch,oracle}.pt "$out/seed$seed"
        done
        cp -n runs/ablation/plain/results.jsonl "$out" # lines of models that are not there are dropped
    fi
    python experiments/rivals.py all --split validation --seeds 30,31 --attackers fixed,rescaled \
        --out "$out" --methods "${@:2}"
}
variant plain finetune,uniform,gc,gc-head # 2 chunks of 16 images, inner products, backbone alone
variant chunks4 gc --chunks 4 --chunk-size 8
variant chunks8 gc --chunks 8 --chunk-size 4
variant twice gc --chunks 2 --chunk-size 32
variant cos gc --similarity cos
variant start0 finetune,gc --perturb 0
