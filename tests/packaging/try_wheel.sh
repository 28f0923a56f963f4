#!/usr/bin/env bash
# Install a wheel into a clean environment and use it from a folder with the user's own modules of
# the names that the wheel must not take: server.py and training/.
set -euo pipefail
wheel=$(realpath "$1")
constraints=$(realpath "$(dirname "$0")/../../constraints.txt")
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip --disable-pip-version-check -q install -c "$constraints" "$wheel"
mkdir -p "$place/user/training"
echo 'NAME = "the user own server"' > "$place/user/server.py"
echo 'NAME = "the user own training"' > "$place/user/training/__init__.py"
cd "$place/user"
PATH="$place/venv/bin:$PATH"
llmserve --version
for verb in data train quantize export generate chat serve bench demo; do
  llmserve "$verb" --help > /dev/null
done
python - <<'PY'
import server, training
assert server.NAME == "the user own server" and training.NAME == "the user own training"
import llmserve.benchmarks, llmserve.export, llmserve.server, llmserve.training
from llmserve.server.app import create_app  # serving imports without torch
import sys
assert "torch" not in sys.modules
PY
code=0
llmserve serve no-such-model 2> error.txt || code=$?
grep -q "no-such-model" error.txt
[ "$code" -ne 0 ] && [ "$(wc -l < error.txt)" -eq 1 ]
echo "the wheel works: $(basename "$wheel")"
