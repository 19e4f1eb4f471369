#!/usr/bin/env bash
# A tour of a running server with curl: hack/try.sh [URL] [MODEL]
#
# URL is http://localhost:8080 if not given, MODEL what the server serves. TOKEN is sent as a bearer
# token, CA is a file of certificates to trust, HOST_HEADER the name that a gateway routes by.
set -euo pipefail

case "${1:-}" in -h | --help) sed -n '2,5s/^# \{0,1\}//p' "$0" && exit ;; esac
url=${1:-http://localhost:8080}
url=${url%/}
model=${2:-}

curl_options=(--silent --show-error --fail-with-body --max-time 600)
[ -z "${TOKEN:-}" ] || curl_options+=(--header "Authorization: Bearer $TOKEN")
[ -z "${CA:-}" ] || curl_options+=(--cacert "$CA")
[ -z "${HOST_HEADER:-}" ] || curl_options+=(--header "Host: $HOST_HEADER")

step() { printf '\n== %s\n' "$1"; }
get() { curl "${curl_options[@]}" "$url$1"; }
post() {
    curl "${curl_options[@]}" --no-buffer --header "Content-Type: application/json" \
        --data "$2" "$url$1"
}

step "Is it ready?   GET /health"
get /health >/dev/null || {
    [ $? -ne 7 ] || echo "no server answers at $url; start one with make serve" >&2
    exit 1
}
echo yes

step "What does it serve?   GET /v1/models"
models=$(get /v1/models)
echo "$models"
[ -n "$model" ] || model=$(sed -E 's/.*"id":"([^"]+)".*/\1/; q' <<<"${models%%\},*}")

step "A question   POST /v1/chat/completions"
post /v1/chat/completions "{\"model\": \"$model\", \"max_tokens\": 64,
    \"messages\": [{\"role\": \"user\", \"content\": \"What is 17 + 25?\"}]}"
echo

step "The same, streamed"
post /v1/chat/completions "{\"model\": \"$model\", \"max_tokens\": 64, \"stream\": true,
    \"messages\": [{\"role\": \"user\", \"content\": \"What is 17 + 25?\"}]}"

step "In the form of OpenAI's newer API   POST /v1/responses"
post /v1/responses "{\"model\": \"$model\", \"max_output_tokens\": 64,
    \"input\": \"What is 17 + 25?\"}"
echo

step "As its authors decode   POST /v1/completions, profile exact"
post /v1/completions "{\"model\": \"$model\", \"max_tokens\": 32, \"profile\": \"exact\",
    \"prompt\": \"The capital of France is\"}"
echo

step "Through KServe's V1   POST /v1/models/$model:predict"
post "/v1/models/$model:predict" '{"instances": ["The capital of France is"], "parameters": {"max_tokens": 16}}'
echo

step "Through KServe's V2   POST /v2/models/$model/infer"
post "/v2/models/$model/infer" '{"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES",
    "data": ["The capital of France is"]}], "parameters": {"max_tokens": 16}}'
echo

step "What it counted   GET /metrics"
get /metrics | grep -E '^vdiff_(requests|generation_tokens|forwards)[a-z_]*\{' || true
