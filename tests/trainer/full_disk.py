"""Plugin for --external_plugins: the disk of the companion's lines, and of what it prints, is full. For tests."""

import os
import sys

os.environ["MHTRAIND_COMPANION_TELEMETRY"] = "/dev/full"


class Full:
    """Standard error, but for the companion."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        if "mhtraind companion" in text:
            raise OSError(28, "No space left on device")
        return self.stream.write(text)

    def __getattr__(self, name):
        return getattr(self.stream, name)


sys.stderr = Full(sys.stderr)
