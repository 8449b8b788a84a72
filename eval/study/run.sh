#!/usr/bin/env bash
# The study of routers: calibration, correlations, and held-out perplexity and KL of every rule beside static routing at
# the same mean k.
#
#   eval/study/run.sh CHECKPOINT TRAIN.txt HELD_OUT.txt OUT
#
# CHECKPOINT is a folder, TRAIN.txt what is calibrated on, HELD_OUT.txt what is measured on. Runs in OUT, so that what the
# documents quote has no path of this machine. Needs the release binaries on the PATH.
set -euo pipefail

checkpoint=$(realpath "$1") train=$(realpath "$2") held_out=$(realpath "$3")
mkdir -p "$4"
cd "$4"
name=$(basename "$checkpoint")
ln -sfn "$checkpoint" "$name"
ln -sf "$train" train.txt
ln -sf "$held_out" held-out.txt

moe-calibrate --model "$name" --data train.txt --tokens 8192 --held-out-tokens 8192 --target-flops 0.7 \
  --report correlations.json --out policy.json | tee calibration.txt

share=("dynk:0.5,0.65,0.8,0.95" "ratio:0.5" "threshold:0.2" "threshold:keep:0.7,cal=policy.json" "skip:auto,cal=policy.json"
  "contrib:0.65,cal=policy.json" "contrib:0.8,cal=policy.json" "policy:policy.json" "policy:policy.json,at=0.85")
for estimator in router-entropy router-margin hidden-norm gradient-norm gradient-variance attention-entropy surprisal \
  logit-lens perplexity-proxy; do
  share+=("complexity:$estimator,cal=policy.json")
done
share+=("dynk:0.65,weights=renorm" "dynk:0.65,weights=keep" "dynk:0.65,weights=lsq,cal=policy.json")
routers=()
for router in "${share[@]}"; do
  routers+=(--router "$router")
done
moe-eval --model "$name" --tasks perplexity --text held-out.txt --window 256 --text-tokens 16384 "${routers[@]}" \
  --compare-static --output report
rm -f "$name" train.txt held-out.txt
