#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# From a fresh clone to decoded words: installs into .venv, trains a small T5 to pronounce English
# words, measures it on words it never saw, and shows some of them. A second run goes on from what
# is there. PYTHON=python3.12 launch/quickstart.sh takes another interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
began=$(date +%s)
python=.venv/bin/python
run=runs/quickstart

say() { printf '\n%s\n' "== $*" >&2; }

say "1/4 Installing into .venv"
[ -x "$python" ] || "${PYTHON:-python3}" -m venv .venv
"$python" -m pip install --quiet --disable-pip-version-check .

say "2/4 Training: spelling to phonemes, on the CMU Pronouncing Dictionary"
"$python" -m t5x_lite.train --gin_file=configs/runs/quickstart.gin --gin.MODEL_DIR="$run"

say "3/4 Measuring on words of the test split, which no training saw (= right, else what is right)"
"$python" -m t5x_lite.eval --checkpoint="$run" --split=test --examples=2000 --show=12 \
  --json="$run/test.json"

say "4/4 Saying words that are in no dictionary"
printf '%s\n' transformerish unquenchably blockwisely |
  "$python" -m t5x_lite.infer --checkpoint="$run" --text

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
