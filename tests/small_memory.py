"""What a run takes of memory, measured in a process that holds nothing else."""

import subprocess
import sys

CODE = """
import multiprocessing, sys, threading
from tva.merge import kernels
from tva.compose import compose
from tva.sizes import anonymous_memory
from tva.compose.revert import revert
from tva.compose.verify import verify

def run(statement, spare):
    before, done = anonymous_memory(), threading.Event()
    peak, budget = [before], before // 2**20 + spare
    def watch():
        while not done.wait(0.005):
            peak[0] = max(peak[0], anonymous_memory())
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    exec(statement, globals() | {"memory": f"{budget}MiB"})
    done.set()
    thread.join()
    assert peak[0] <= budget * 2**20, (peak[0] / 2**20, before / 2**20, budget)

kernels.load()
exec(sys.argv[2])
for statement in sys.argv[3:]:  # each in a fork, which begins with what the imports take and nothing of the others
    case = multiprocessing.get_context("fork").Process(target=run, args=(statement, int(sys.argv[1])))
    case.start()
    case.join()
    if case.exitcode:
        sys.exit(f"{statement} ended with {case.exitcode}")
"""


def assert_within(folder, spare, *statements, first=""):
    """Run statements one by one in a folder, and check that each stays within ``memory``.

    Args:
        folder: Where they run.
        spare: MiB above what the process held before; ``memory`` in a statement is the sum, for ``max_memory``.
        statements: Python, with ``compose``, ``verify`` and ``revert``.
        first: Python that runs before all is measured, such as ``import torch``, which `compose` alone can do without.
    """
    command = [sys.executable, "-c", CODE, str(spare), first, *statements]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
