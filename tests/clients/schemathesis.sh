#!/usr/bin/env bash
# Thousands of requests made from /openapi.json, good and bad: none may give a 5xx, and every answer must be as the
# document says.
#
#   schemathesis.sh --url http://127.0.0.1:8000 [--api-key KEY] [--examples 60] [--schema FILE] [--seed 1]
#
# Best against a server with a short context (--max-model-len 128): many of the requests are valid and are computed.
set -euo pipefail

url='' key='' examples=60 schema='' seed=1
while [ $# -gt 0 ]; do
  case $1 in
    --url) url=${2%/} ;;
    --api-key) key=$2 ;;
    --examples) examples=$2 ;;
    --schema) schema=$2 ;;
    --seed) seed=$2 ;;
    *) echo "schemathesis.sh: unknown argument $1" >&2; exit 2 ;;
  esac
  shift 2
done
[ -n "$url" ] || { echo "schemathesis.sh: --url is required" >&2; exit 2; }

# Not asked for: negative_data_rejection (a schema cannot say all that is wrong, nor that all it forbids is refused) and
# positive_data_acceptance (nor that a prompt is too long or a token unknown).
checks=not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance
checks=$checks,response_schema_conformance,unsupported_method
options=(--url "$url" --phases examples,coverage,fuzzing --max-examples "$examples" --seed "$seed")
# A request that takes longer than this is a fault.
options+=(--request-timeout 120 --continue-on-failure --generation-database none --no-color)
if [ -n "$key" ]; then
  checks=$checks,ignored_auth
  options+=(--header "Authorization: Bearer $key")
else
  # Without a secret in them, requests are shown as they were: "max_tokens" is no secret.
  options+=(--output-sanitize false)
fi

# No report folders or caches in the working directory.
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
[ -z "$schema" ] || schema=$(realpath "$schema")
cd "$scratch"
"${SCHEMATHESIS:-schemathesis}" run --checks "$checks" "${options[@]}" "${schema:-$url/openapi.json}"
