#!/usr/bin/env bash
# What is to be measured on a GPU, within nine minutes of an H100: bash experiments/gpu.sh FOLDER
# CIFAR's binary files are expected in data/, or where DTL_DATA_DIR says.
set -u
out=${1:-runs/gpu}
mkdir -p "$out"
for network in resnet8 resnet18; do
  python experiments/benchmark.py loss cuda $network >"$out/bench-$network.txt" 2>&1
done
timeout 120 python -m pytest -q -m gpu >"$out/pytest.txt" 2>&1
methods=finetune,uniform,gc,uniform-fresh,gc-fresh
for seed in 0 1 2; do # what time does not allow goes on from here with the same command
  timeout 400 python dtl.py all --gpu 0 --seeds $seed --methods $methods --attackers all --out "$out/cifar-$seed"
done
