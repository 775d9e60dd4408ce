#!/usr/bin/env bash
# Expected: one call of MlflowClient.create_run makes one run, or raises.
# What happens (mlflow 3.17.2, a tracking server over HTTP): if the connection breaks after the server has
#   made the run and before its answer has arrived, the client sends the POST again without a word. The call
#   returns the second run; the first stays in the experiment as RUNNING for ever. A POST has no key by which
#   the server could know it again. The client's retries are urllib3's, with every method allowed.
# Who is hit: long trainings behind a load balancer or a proxy that restarts: a table with runs that never end.
# raysl: each run has a key in a tag, and is searched by it before create_run and after it.
set -euo pipefail
work=$(mktemp -d); server=
trap 'test -z "$server" || kill "$server" 2>/dev/null || true; wait 2>/dev/null || true; rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q --disable-pip-version-check install mlflow==3.17.2
cd "$work"
port=$("$work/venv/bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
"$work/venv/bin/mlflow" server --backend-store-uri sqlite:///mlflow.db --host 127.0.0.1 --port "$port" \
  --workers 1 >"$work/server.log" 2>&1 &
server=$!
"$work/venv/bin/python" -W ignore - "$port" <<'PY' 2>"$work/log"
import http.client, http.server, sys, threading, time, urllib.request
import mlflow
from mlflow.tracking import MlflowClient

port, posts = int(sys.argv[1]), []
for _ in range(240):
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
        break
    except OSError:
        time.sleep(0.5)


class Proxy(http.server.BaseHTTPRequestHandler):
    """Passes requests on; loses the answer to the first creation of a run."""

    def do(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        there = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "connection")}
        there.request(self.command, self.path, body, headers)
        answer = there.getresponse()
        content = answer.read()
        if self.path.endswith("/runs/create"):
            posts.append(answer.status)
            if len(posts) == 1:
                self.close_connection = True
                return
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.headers.get("Content-Type", "application/json"))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do

    def log_message(self, *_):
        pass


proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
threading.Thread(target=proxy.serve_forever, daemon=True).start()
print("mlflow", mlflow.__version__)
client = MlflowClient(f"http://127.0.0.1:{proxy.server_port}")
experiment = client.create_experiment("e")
run = client.create_run(experiment, run_name="one")
client.set_terminated(run.info.run_id)
runs = client.search_runs([experiment])
states = sorted(each.info.status for each in runs)
print(f"calls of create_run: 1 | POSTs answered by the server: {posts} | runs: {states}")
sys.exit(not (posts == [200, 200] and states == ["FINISHED", "RUNNING"]))
PY
