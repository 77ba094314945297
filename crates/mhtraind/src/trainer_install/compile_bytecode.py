"""Compiles one share of a directory's Python sources: SHARE of SHARES, counted from 0.

    python -I compile_bytecode.py DIRECTORY SHARE SHARES

Prints "FINISHED TOTAL", in KiB of source of its share, a few times a second. Every share walks the same tree and deals
the files by size, so the shares are equal in work and need not talk to each other. A file that does not compile is
left out: packages carry templates and sources of other Python versions, and Python itself goes on without bytecode.
The packages' own tests are left out too: a sixth of all source, which no training imports.
"""

import os
import py_compile
import sys
import time
import warnings


def sources(directory):
    found = []
    for folder, folders, names in os.walk(directory):
        folders[:] = [name for name in folders if name not in ("tests", "__pycache__")]
        for name in names:
            if name.endswith(".py"):
                path = os.path.join(folder, name)
                try:
                    found.append((os.path.getsize(path), path))
                except OSError:
                    pass  # a dangling link
    found.sort(reverse=True)
    return found


def main():
    directory, share, shares = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    warnings.simplefilter("ignore")  # of other people's sources
    mine = sources(directory)[share::shares]
    total, finished, told = sum(size for size, _ in mine), 0, 0.0
    for size, path in mine:
        try:
            py_compile.compile(path, doraise=True)
        except (py_compile.PyCompileError, ValueError, RecursionError):
            pass
        finished += size
        if time.monotonic() - told > 0.2 or finished == total:
            told = time.monotonic()
            print(finished >> 10, total >> 10, flush=True)


main()
