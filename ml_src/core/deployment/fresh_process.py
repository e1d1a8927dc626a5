"""Runs a Python command and prints what it took, as JSON: the file that `benchmark.in_fresh_process` starts.

Its own process, because Linux counts what the process held that started another one as that one's own memory
(`setmax_mm_hiwater_rss` in fs/exec.c); the launcher is to be small. It imports nothing but the standard library.
"""

import json
import os
import subprocess
import sys
import time

if __name__ == "__main__":
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *sys.argv[1:]], stdout=subprocess.PIPE)
    assert process.stdout is not None
    line = process.stdout.readline()
    seconds = time.perf_counter() - started
    while process.stdout.read(65536):  # a full pipe would hold it up
        pass
    _, status, usage = os.wait4(process.pid, 0)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
    found = {"first_line": bool(line), "seconds": seconds, "peak_bytes": usage.ru_maxrss * unit}
    print(json.dumps({**found, "exit_code": os.waitstatus_to_exitcode(status)}))
