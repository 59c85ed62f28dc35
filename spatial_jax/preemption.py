"""SIGTERM: schedulers send it before they stop a process; the run saves and exits with code 143.

SIGTERM ──► `requested`; the loop ends its step, saves and raises Terminated
   └── the step is not done within the grace period ──► it is abandoned: a thread saves the last
       finished state and exits
second SIGTERM ──► exits at once
"""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

EXIT_CODE = 128 + signal.SIGTERM
GRACE_S = 20.0  # for the step that runs; schedulers wait 30 s, and saving takes time too


class Terminated(BaseException):
  """SIGTERM has arrived and the state is saved; the message is one line for the user."""


def raise_on_sigterm(message: str) -> None:
  """From now on the first SIGTERM raises Terminated and the second one exits at once."""

  def handle(signum: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    raise Terminated(message)

  signal.signal(signal.SIGTERM, handle)


class Preemption:
  """Watches for SIGTERM while a loop runs; a context manager of the main thread.

  A signal handler of Python waits until the main thread returns from a running device program or a
  compilation, which may take minutes. So a thread watches the descriptor that the interpreter
  writes every signal to at once.
  """

  def __init__(self, save_last: Callable[[], str], grace_s: float):
    """Prepares; nothing is installed before `with`.

    Args:
      save_last: saves the last finished state and returns the line to print; called in a thread
        while the main thread is inside `step`.
      grace_s: seconds that a running step has, > 0.
    """
    self._save_last, self._grace_s = save_last, grace_s
    self._requested, self._ended = threading.Event(), threading.Event()
    self._outside = threading.Lock()  # the main thread holds it except inside `step`

  @property
  def requested(self) -> bool:
    """Whether SIGTERM has arrived."""
    return self._requested.is_set()

  @contextlib.contextmanager
  def step(self) -> Iterator[None]:
    """The part of the loop that may be abandoned: one step."""
    self._outside.release()
    try:
      yield
    finally:
      self._outside.acquire()

  def __enter__(self) -> "Preemption":
    self._outside.acquire()
    self._active = threading.current_thread() is threading.main_thread()
    if self._active:  # elsewhere Python allows no signal handlers
      reader, self._writer = socket.socketpair()
      self._writer.setblocking(False)
      self._handler = signal.signal(signal.SIGTERM, lambda *_: self._requested.set())
      self._descriptor = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
      self._thread = threading.Thread(target=self._watch, args=(reader,), daemon=True)
      self._thread.start()
    return self

  def __exit__(self, *_: object) -> None:
    self._ended.set()
    if self._active:
      signal.set_wakeup_fd(self._descriptor)
      signal.signal(signal.SIGTERM, self._handler)
      self._writer.close()
      self._thread.join()
    self._outside.release()

  def _watch(self, reader: socket.socket) -> None:
    signals = 0
    with reader:
      while received := reader.recv(64):
        for _ in range(received.count(signal.SIGTERM)):
          signals += 1
          if signals > 1:
            os._exit(EXIT_CODE)
          self._requested.set()
          threading.Thread(target=self._abandon, daemon=True).start()

  def _abandon(self) -> None:
    """Saves the last finished state and exits if the loop does not end in the grace period."""
    if self._ended.wait(self._grace_s):
      return
    with self._outside:
      if not self._ended.is_set():
        try:
          print(f"\n{self._save_last()}", file=sys.stderr, flush=True)
        finally:
          os._exit(EXIT_CODE)
