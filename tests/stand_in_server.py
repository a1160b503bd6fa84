"""Stands in for SGLang's command line where the process matters and SGLang does not: an HTTP server with children.

    STAND_IN="WORD ..." stand_in_server.py ... --port PORT ...

Its child ends only when it is killed. Words: stubborn (so does it), runaway (a second child leaves the session and
has a child itself), fails, silent (it never answers).
"""

import http.server
import os
import signal
import subprocess
import sys
import tempfile
import time

SLEEPER = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
RUNAWAY = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {SLEEPER!r}]); {SLEEPER}"
behaviour = os.environ["STAND_IN"]

print("stand-in starts", flush=True)
tempfile.mkstemp(suffix="-left-behind")


def take_leave(*_: object) -> None:
    time.sleep(0.3)
    sys.exit("stand-in ends")


signal.signal(signal.SIGTERM, signal.SIG_IGN if "stubborn" in behaviour else take_leave)
subprocess.Popen([sys.executable, "-c", SLEEPER])
if "runaway" in behaviour:
    subprocess.Popen([sys.executable, "-c", RUNAWAY], start_new_session=True)
if "fails" in behaviour:
    sys.exit("no such model; exit")
if "silent" in behaviour:
    time.sleep(600)

ready_at = time.monotonic() + 0.5


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if time.monotonic() > ready_at else 503)
        self.end_headers()
        self.wfile.write(str(os.getpid()).encode())

    def log_message(self, *_: object) -> None:
        pass


http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
