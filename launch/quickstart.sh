#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# From a fresh clone to decoded words: --help.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/steps.sh
. launch/steps.sh
# shellcheck source=launch/environment.sh
. launch/environment.sh

usage() {
  cat <<'EOT'
Installs t5x_lite into .venv, trains a small T5 to pronounce English words, evaluates it on words of
the test split and prints some of them. A second run resumes the first.

  launch/quickstart.sh [--unpinned]

flags
  --unpinned  with the newest versions that pyproject.toml allows, tested or not; otherwise with the
              newest tested ones

environment
  PYTHON      interpreter for a new .venv (default python3)

examples
  launch/quickstart.sh
  PYTHON=python3.13 launch/quickstart.sh
EOT
}

versions=newest
while [ $# -gt 0 ]; do
  case "$1" in
    --unpinned) versions=unpinned ;;
    --help | -h) usage; exit ;;
    *) refuse "unknown flag $1" ;;
  esac
  shift
done
began=$(date +%s)
run=runs/quickstart

say "1/4 Installing into .venv"
VIRTUAL_ENV="" use_environment .venv
install "$versions" .

say "2/4 Training: spelling to phonemes, on the CMU Pronouncing Dictionary"
"$python" -m t5x_lite.train --gin_file=configs/runs/quickstart.gin --gin.MODEL_DIR="$run"

say "3/4 Measuring on words of the test split, which no training saw (= right, else what is right)"
"$python" -m t5x_lite.eval --checkpoint="$run" --split=test --examples=2000 --show=12 \
  --json="$run/test.json"

say "4/4 Saying words that are in no dictionary"
"$python" -m t5x_lite.infer --checkpoint="$run" --text << 'WORDS'
transformerish
unquenchably
blockwisely
WORDS

# report.json: what training wrote, with the test split's numbers and the time of everything.
"$python" - "$run" "$began" <<'PYTHON'
import json, pathlib, sys, time

run, began = pathlib.Path(sys.argv[1]), int(sys.argv[2])
report = json.loads((run / "report.json").read_text())
test = json.loads((run / "test.json").read_text())["metrics"]
report |= {"split": "test", **test}
report["total_seconds"] = time.time() - began
(run / "report.json").write_text(json.dumps(report, indent=2) + "\n")
print(
    f"\nphoneme error rate {report['per']:.1f} %, word error rate {report['wer']:.1f} %; trained in "
    f"{report['train_seconds']:.0f} s, all in {report['total_seconds']:.0f} s"
)
PYTHON

cat <<EOF

Written
  $run/report.json, test.json    the numbers
  $run/learning_curve.png        loss against step
  $run/checkpoints/              weights to go on from
  $run/predictions/              what it said for every test word

Next
  .venv/bin/python -m t5x_lite.infer --checkpoint=$run --text            (type words, then Ctrl-D)
  .venv/bin/python -m t5x_lite.eval --checkpoint=$run --split=test --beams=4
  .venv/bin/python -m t5x_lite.train --gin_file=configs/runs/g2p.gin --gin.MODEL_DIR=runs/g2p
EOF
