"""An iterator that is run ahead of its consumer in a thread."""

import queue
import threading
from collections.abc import Iterator


class Prefetcher:
    """Runs an iterator in a thread, `depth` items ahead; its exception reaches the consumer."""

    def __init__(self, iterator: Iterator, depth: int = 2):
        self.items: queue.Queue = queue.Queue(maxsize=depth)
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.run, args=(iterator,), daemon=True)
        self.thread.start()

    def run(self, iterator: Iterator) -> None:
        try:
            for item in iterator:
                if not self.put((item, None)):
                    return
            self.put((None, StopIteration()))
        except Exception as error:
            self.put((None, error))

    def put(self, item: tuple) -> bool:
        while not self.stopped.is_set():
            try:
                self.items.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator:
        while True:
            item, error = self.items.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item

    def close(self, wait: bool = True) -> None:
        """Stops the thread, however the loop ended; `wait` waits for the item in progress."""
        self.stopped.set()
        if wait:
            self.thread.join()
