"""A server that answers /200 with 200, /503 with 503 and everything else with 404, and one that never answers.

Prints both ports on one line and runs until it is killed.
"""

import http.server
import socket
import threading


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response({"/200": 200, "/503": 503}.get(self.path, 404))
        self.end_headers()

    def log_message(self, *_):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
mute = socket.create_server(("127.0.0.1", 0))
print(server.server_port, mute.getsockname()[1], flush=True)
threading.Thread(target=server.serve_forever, daemon=True).start()
threading.Event().wait()
