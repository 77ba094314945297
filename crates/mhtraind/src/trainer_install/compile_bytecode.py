"""Compiles one share of a directory's Python sources: SHARE of SHARES, counted from 0.

    python -I compile_bytecode.py DIRECTORY SHARE SHARES

Prints "FINISHED TOTAL" of its share now and then. Every share walks the same tree and deals the files by size, so the
shares are equal in work and need not talk to each other. A file that does not compile is left out: packages carry
templates and sources of other Python versions, and Python itself goes on without bytecode.
"""

import os
import py_compile
import sys
import warnings


def sources(directory):
    found = []
    for folder, _, names in os.walk(directory):
        for name in names:
            if name.endswith(".py"):
                path = os.path.join(folder, name)
                try:
                    found.append((os.path.getsize(path), path))
                except OSError:
                    pass  # a dangling link
    found.sort(reverse=True)
    return [path for _, path in found]


def main():
    directory, share, shares = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    warnings.simplefilter("ignore")  # of other people's sources
    mine = sources(directory)[share::shares]
    for finished, path in enumerate(mine, start=1):
        try:
            py_compile.compile(path, doraise=True)
        except (py_compile.PyCompileError, ValueError, RecursionError):
            pass
        if finished % 50 == 0 or finished == len(mine):
            print(finished, len(mine), flush=True)


main()
