#!/usr/bin/env bash
# A real Prometheus: promtool finds nothing to say about /metrics, and one scrape arrives.
set -euo pipefail

: "${LLMSERVE_URL:?the address of a server}"
target=${LLMSERVE_URL#http://}
folder=$(mktemp -d)
trap 'kill "${server:-}" 2>/dev/null || true; rm -rf "$folder"' EXIT

curl -sSf "$LLMSERVE_URL/metrics" | promtool check metrics
echo "promtool $(promtool --version 2>&1 | head -1 | cut -d' ' -f3): nothing to complain of"

cat > "$folder/prometheus.yml" <<YAML
global: {scrape_interval: 1s, scrape_timeout: 1s}
scrape_configs:
  - job_name: llmserve
    static_configs: [{targets: ["$target"]}]
YAML
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
prometheus --config.file="$folder/prometheus.yml" --storage.tsdb.path="$folder/data" \
    --web.listen-address="127.0.0.1:$port" --log.level=error &
server=$!

ask() { curl -sSf "http://127.0.0.1:$port/api/v1/query" --data-urlencode "query=$1" 2>/dev/null || true; }
for _ in $(seq 100); do
    if ask 'up{job="llmserve"}' | grep -q '"1"\]'; then
        ask 'llmserve_generation_tokens_total' | grep -q '"value"'
        ask 'llmserve_time_to_first_token_seconds_bucket' | grep -q '"le":"+Inf"'
        echo "prometheus: scraped, counters and histograms are there"
        exit 0
    fi
    sleep 0.2
done
echo "prometheus: no scrape of $target arrived" >&2
exit 1
