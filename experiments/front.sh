#!/bin/bash
# The front, as it was planned before it was run: how much an attacker gets at what price, by
# allowance. Start it as many times as there are cores; each process takes the next seed.
#
#     bash experiments/front.sh data & bash experiments/front.sh data      # data: where CIFAR lies
#
# Pair c100-c10 of pairs.py (40 classes of CIFAR-100 to CIFAR-10, 40 images a class, 16 pixels) at
# the defaults for own data, but half of their steps for what starts fresh (1500, as disposal has),
# for want of time. Seeds 10 to 14 were used for no choice. oracle has all 120 images a class. Parts
# in order of importance, each for all five seeds before the next: what starts half-way; what starts
# fresh; a third attacker at the default allowance; a fourth. The first two are the least that
# counts, and no seed, allowance or attacker of theirs is left out of what is published.
# After a kill: rm -r runs/front/claims, and start again.
cd "$(dirname "$0")/.." || exit 1
export OMP_NUM_THREADS=1
HALF_WAY=finetune,uniform@0.5,gc@0.5,uniform,gc,uniform@2,gc@2
FRESH=distill-fresh,uniform-fresh@0.5,gc-fresh@0.5,uniform-fresh,gc-fresh,uniform-fresh@2,gc-fresh@2
for part in "fixed,rescaled $HALF_WAY" "fixed,rescaled $FRESH" \
    "sceptic uniform,gc,distill-fresh,uniform-fresh,gc-fresh" "long $HALF_WAY,$FRESH"; do
    read -r attackers methods <<< "$part"
    for seed in 10 11 12 13 14; do
        mkdir -p runs/front/claims
        mkdir "runs/front/claims/$attackers-${methods%%,*}-$seed" 2> /dev/null || continue
        python experiments/pairs.py c100-c10 --data-dir "$1" --fresh-steps 1500 --seeds "$seed" \
            --methods "$methods" --attackers "$attackers" --out "runs/front/$seed" \
            >> "runs/front/$seed.log" 2>&1
    done
done
