# To be sourced where Ray's head starts: starts Prometheus unless it runs already. It finds the nodes by the file that
# Ray's head keeps, and listens on loopback, because it asks nobody for a token.
PROMETHEUS_FOLDER="${PROMETHEUS_FOLDER:-$HOME/prometheus}"
PROMETHEUS_ADDRESS="${PROMETHEUS_ADDRESS:-127.0.0.1:9090}"
export RAY_PROMETHEUS_HOST="http://$PROMETHEUS_ADDRESS"
if ! python -c 'import sys, urllib.request as url; url.urlopen(sys.argv[1], timeout=5)' "$RAY_PROMETHEUS_HOST/-/ready" 2>/dev/null; then
  mkdir -p "$PROMETHEUS_FOLDER"
  setsid nohup prometheus --config.file="${PROMETHEUS_CONFIG:-cluster/prometheus/prometheus.yml}" \
    --storage.tsdb.path="$PROMETHEUS_FOLDER/data" --storage.tsdb.retention.time=30d \
    --web.listen-address="$PROMETHEUS_ADDRESS" >"$PROMETHEUS_FOLDER/server.log" 2>&1 &
fi
