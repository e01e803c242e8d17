#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# From a fresh clone to decoded words: installs into .venv, trains a small T5 to pronounce English
# words, measures it on words it never saw, and says a few of them. A second run goes on from what
# is there. PYTHON=python3.12 launch/quickstart.sh takes another interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
began=$(date +%s)
python=.venv/bin/python
run=runs/quickstart

say() { printf '\n\033[1m%s\033[0m\n' "$*" >&2; }

say "1/4 Installing into .venv"
[ -x "$python" ] || "${PYTHON:-python3}" -m venv .venv
"$python" -m pip install --quiet --disable-pip-version-check .

say "2/4 Training: spelling to phonemes, CMU Pronouncing Dictionary"
"$python" -m t5x_lite.train --gin_file=configs/runs/quickstart.gin --gin.MODEL_DIR="$run"

say "3/4 Measuring on held-out words of the test split"
"$python" -m t5x_lite.eval --checkpoint="$run" --split=test --examples=2000 --show=0 --json="$run/test.json"

say "4/4 Saying words that are in no training file"
printf '%s\n' jaxon transformerish unquenchably gindom pallasian |
  "$python" -m t5x_lite.infer --checkpoint="$run" --text

"$python" -m t5x_lite.quickstart_report --checkpoint="$run" --began="$began"
