#!/usr/bin/env bash
# Real clients against the release server: openai-python, lm-eval, schemathesis, and the pages in a browser.
#
#   tests/clients/run.sh [FOLDER] [--server BINARY]
#
# FOLDER (target/clients unless given) gets a Python environment with what requirements.txt pins, logs and screenshots;
# it is used again the next time. Needs Python 3.11 or later and, the first time, the network. The browser's part is
# left out, and said to be, where node or Chromium (CHROMIUM, or /usr/bin/chromium) is missing. Exits 1 if anything failed.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
cd "$root"

folder=target/clients server=''
while [ $# -gt 0 ]; do
  case $1 in
    --server) server=$2; shift 2 ;;
    -*) echo "run.sh: unknown argument $1" >&2; exit 2 ;;
    *) folder=$1; shift ;;
  esac
done
mkdir -p "$folder"
folder=$(realpath "$folder")

if [ -z "$server" ]; then
  cargo build --release --locked --bin moe-serve
  server=${CARGO_TARGET_DIR:-target}/release/moe-serve
fi

python=$folder/venv/bin/python
if ! cmp -s "$here/requirements.txt" "$folder/installed.txt"; then
  [ -x "$python" ] || python3 -m venv "$folder/venv"
  "$python" -m pip install --quiet --disable-pip-version-check -r "$here/requirements.txt"
  cp "$here/requirements.txt" "$folder/installed.txt"
fi

pid='' url=''
stop() {
  [ -z "$pid" ] && return
  kill "$pid" 2>/dev/null || true
  wait "$pid" 2>/dev/null || true
  pid=''
}
trap stop EXIT

# start NAME ARGUMENT…: the server on a free port, once it is ready; its address is in $url.
start() {
  stop
  local log=$folder/$1.log
  shift
  "$server" --model models/stories --offline --port 0 "$@" >"$log" 2>&1 &
  pid=$!
  for _ in $(seq 300); do
    url=$(sed -n 's/^address *\(https\?:[^ ]*\).*/\1/p' "$log")
    if [ -n "$url" ] && "$python" - "$url" <<'PY' 2>/dev/null; then return; fi
import sys, urllib.request
urllib.request.urlopen(sys.argv[1] + "/health", timeout=2)
PY
    kill -0 "$pid" 2>/dev/null || break
    sleep 0.1
  done
  echo "run.sh: the server did not start:" >&2
  cat "$log" >&2
  exit 1
}

summary=() failed=0
# client NAME COMMAND…
client() {
  local name=$1 seconds=$SECONDS
  shift
  printf '\n== %s\n' "$name"
  if "$@"; then
    summary+=("ok      $name ($((SECONDS - seconds)) s)")
  else
    summary+=("FAILED  $name ($((SECONDS - seconds)) s)")
    failed=1
  fi
}

template=$here/chat_template.jinja
additions=(--allow-request-router --request-experts-max 8 --allow-moe-trace)

# As a base model is served, in the precision that transformers is compared with.
start plain --dtype f32
client 'openai-python, no chat template' "$python" "$here/openai_client.py" --url "$url"
client 'lm-eval' "$python" "$here/lm_eval_client.py" --url "$url" --checkpoint models/stories

# Everything switched on, behind a key, with a queue that can be overrun.
start full --chat-template "$template" --api-key the-key-of-these-tests "${additions[@]}" --max-num-seqs 8 --max-queue 32
client 'openai-python, chat, key, full queue' "$python" "$here/openai_client.py" --url "$url" --chat \
  --api-key the-key-of-these-tests --provoke-429 120

# A short context: most of what schemathesis makes up is valid, and computed.
start short --chat-template "$template" "${additions[@]}" --max-model-len 128
client 'schemathesis' env SCHEMATHESIS="$folder/venv/bin/schemathesis" "$here/schemathesis.sh" --url "$url"

if command -v node >/dev/null && command -v npm >/dev/null && [ -x "${CHROMIUM:-/usr/bin/chromium}" ]; then
  # Node looks for packages beside the script.
  mkdir -p "$folder/pages"
  cp "$here/pages.mjs" "$folder/pages/"
  [ -d "$folder/pages/node_modules/playwright-core" ] ||
    npm install --silent --no-audit --no-fund --prefix "$folder/pages" playwright-core@1.65.1
  start pages "${additions[@]}"
  client 'pages in Chromium' node "$folder/pages/pages.mjs" "$url" "$folder/pages/screenshots"
else
  summary+=('SKIPPED pages in Chromium (no node, npm or Chromium)')
fi

stop
printf '\n== summary\n'
printf '%s\n' "${summary[@]}"
exit "$failed"
