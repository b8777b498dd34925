# To be sourced where Ray's head starts: starts MLflow unless it runs already, and sets MLFLOW_TRACKING_URI for what
# starts after it. MLFLOW_HOST (default: this node's private address) and MLFLOW_PORT say where it listens;
# MLFLOW_BACKEND_STORE_URI and MLFLOW_ARTIFACTS_DESTINATION where runs and files are, else SQLite and a folder in
# MLFLOW_FOLDER, which has its log. The password of a PostgreSQL is not in the URI but in the file PGPASSFILE.
MLFLOW_HOST="${MLFLOW_HOST:-$(python -c 'import ray.util; print(ray.util.get_node_ip_address())')}"
export MLFLOW_TRACKING_URI="http://$MLFLOW_HOST:${MLFLOW_PORT:-5000}"
# As lemon/runtime/__init__.py: neither calls home unless it was switched on.
export RAY_USAGE_STATS_ENABLED="${RAY_USAGE_STATS_ENABLED:-0}" MLFLOW_DISABLE_TELEMETRY="${MLFLOW_DISABLE_TELEMETRY:-true}"
MLFLOW_FOLDER="${MLFLOW_FOLDER:-$HOME/mlflow}"
mkdir -p "$MLFLOW_FOLDER"
lemon_mlflow_answers() {
  python -c 'import sys, urllib.request as url; url.urlopen(sys.argv[1], timeout=5)' "$MLFLOW_TRACKING_URI/health" \
    2>/dev/null
}
if ! lemon_mlflow_answers; then
  # One worker: of several, uvicorn ends and replaces any that does not answer for 5 s, on a busy machine for ever.
  # No jobs of MLflow's own (evaluations): they take eight processes that LEMON has no use for.
  MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false setsid nohup mlflow server --host "$MLFLOW_HOST" --port "${MLFLOW_PORT:-5000}" --workers 1 \
    --backend-store-uri "${MLFLOW_BACKEND_STORE_URI:-sqlite:///$MLFLOW_FOLDER/mlflow.db}" \
    --artifacts-destination "${MLFLOW_ARTIFACTS_DESTINATION:-$MLFLOW_FOLDER/artifacts}" \
    >"$MLFLOW_FOLDER/server.log" 2>&1 &
  for _ in $(seq 180); do lemon_mlflow_answers && break; sleep 1; done
fi
lemon_mlflow_answers || echo "MLflow does not answer at $MLFLOW_TRACKING_URI: see $MLFLOW_FOLDER/server.log" >&2
