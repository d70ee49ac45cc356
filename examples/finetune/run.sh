#!/usr/bin/env bash
# run.sh [argument of finetune.py...]: SmolLM2-135M tuned with cores and with both controls, by turns, so that they have gone
# equally far whenever this is stopped; called again, it goes on. Writes runs/ and its charts below build/finetune.
# STEPS is how far, PIECE how many steps a turn has.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-build/finetune/bin/python} runs=build/finetune/runs
steps=${STEPS:-60} piece=${PIECE:-20}

[[ -f build/smollm2-data/model.gguf ]] || $python examples/smollm2/prepare.py build/smollm2-data
for ((until = piece; until < steps + piece; until += piece)); do
  for attention in cca dense window; do
    $python examples/finetune/finetune.py build/smollm2-data $runs/$attention --attention $attention --steps "$steps" --until $until "$@"
  done
done
for chart in loss answers recall; do
  $python examples/finetune/plot.py $runs $chart $runs/{dense,cca,window}/log.jsonl
done
