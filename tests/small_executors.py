"""An engine whose calls run here, the last one first, with all that goes to a worker and back pickled."""

import pickle

from tva.executors import Executor, Worker


class Inline(Executor):
    """Runs calls in this process.

    Args:
        num_workers: Processes that it seems to have.
        most: Calls after which the run is interrupted.
    """

    def __init__(self, num_workers=2, most=10**9):
        self.num_workers, self.most = num_workers, most
        self.calls, self.checked, self.closed = 0, [], 0

    def check(self, folder):
        self.checked.append(folder)

    def close(self):
        self.closed += 1

    def run(self, function, items):
        function = pickle.loads(pickle.dumps(function))
        for item in reversed(items):  # calls may end in any order
            if self.calls >= self.most:
                raise KeyboardInterrupt
            self.calls += 1
            try:
                found = function(pickle.loads(pickle.dumps(item)), Worker("inline"))
                yield item, pickle.loads(pickle.dumps(found))
            except Exception as error:
                yield item, error
