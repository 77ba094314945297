"""A hub for tests: serves the directories ROOT/ORG/NAME as models and data sets, as far as huggingface_hub and datasets ask.

    python hub.py ROOT

It prints its port, then a line for each file that is downloaded.
"""

import hashlib
import http.server
import json
import pathlib
import sys

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    root = pathlib.Path(sys.argv[1])

    def log_message(self, *_):
        pass

    def answer(self, body, code=200, **headers):
        self.send_response(code)
        for name, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def answer_json(self, value):
        self.answer(json.dumps(value).encode(), Content_Type="application/json")

    def do_GET(self):
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[0] == "api":
            self.describe("/".join(parts[2:4]), "tree" in parts)
        elif "resolve" in parts:
            at = parts.index("resolve")
            self.send_file("/".join(parts[at - 2 : at]), "/".join(parts[at + 2 :]))
        else:
            self.answer(b"{}", 404)

    do_HEAD = do_GET

    def describe(self, name, tree):
        directory = self.root / name
        if not directory.is_dir():
            return self.answer(b"{}", 404, X_Error_Code="RepoNotFound")
        files = [(path.name, path.stat().st_size) for path in sorted(directory.iterdir())]
        if tree:
            self.answer_json([{"type": "file", "path": path, "size": size, "oid": COMMIT} for path, size in files])
        else:
            siblings = [{"rfilename": path} for path, _ in files]
            self.answer_json({"id": name, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings})

    def send_file(self, name, relative):
        path = self.root / name / relative
        if not path.is_file():
            return self.answer(b"{}", 404, X_Error_Code="EntryNotFound")
        body = path.read_bytes()
        if self.command == "GET":
            print(f"{name}/{relative}", flush=True)
        self.answer(body, ETag=f'"{hashlib.sha1(body).hexdigest()}"')


if __name__ == "__main__":
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    print(server.server_address[1], flush=True)
    server.serve_forever()
