#!/usr/bin/env bash
# Three weights a method on held-out training images, seed 0: what the weights of `cifar-small` are chosen by, and the front
# of target accuracy against worst-case leak. OMP_NUM_THREADS=1 bash experiments/tune.sh OUT [METHODS]
set -euo pipefail
cd "$(dirname "$0")/.."
for weights in \
  neggrad=1,random-labels=3,uniform=3,bad-teacher=3,scrub=3,gc=60,gc-fresh=30 \
  neggrad=3,random-labels=10,uniform=10,bad-teacher=10,scrub=10,gc=120,gc-fresh=45 \
  neggrad=0.3,random-labels=1,uniform=1,bad-teacher=1,scrub=1,gc=30,gc-fresh=15
do
  ${PYTHON:-python} dtl.py audit --preset cifar-small --split validation --forget-weights "$weights" --out "$1" ${2:+--methods "$2"}
done
