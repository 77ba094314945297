"""The fake trainer, with files open where a service manager might remove them, and a look at its token.

While it trains it holds a file open in /tmp and, where it may, one in the daemon's runtime directory. At the end it
writes into its output directory whether each is still at its path, and whether the token has the expected hash: never
the token itself. It goes on living until a file RELEASED appears there, so that whatever is done to the daemon is done
under a trainer, however slow the machine is.
"""

import hashlib
import json
import os
import runpy
import sys
import time

FAKE_SWIFT = "/srv/mhtraind-test/fake_swift.py"


def hold(directory):
    """Returns a file open in the directory and its path; nothing where we may not write."""
    path = os.path.join(directory, f"trainer-{os.getpid()}")
    try:
        return open(path, "w"), path
    except OSError:
        return None


def is_at_its_path(file, path):
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def main():
    held = [file for file in map(hold, ("/tmp", "/run/mhtraind")) if file]
    try:
        runpy.run_path(FAKE_SWIFT, run_name="__main__")
    finally:
        output_dir = sys.argv[sys.argv.index("--output_dir") + 1]
        while not os.path.exists(os.path.join(output_dir, "RELEASED")):
            time.sleep(0.02)
        token = os.environ.get("SWANLAB_API_KEY", "")
        seen = {
            "uid": os.getuid(),
            "held": {path: is_at_its_path(file, path) for file, path in held},
            "token_is_expected": hashlib.sha256(token.encode()).hexdigest() == os.environ.get("EXPECTED_SHA256"),
        }
        with open(os.path.join(output_dir, "seen.json"), "w") as file:
            json.dump(seen, file)


main()
