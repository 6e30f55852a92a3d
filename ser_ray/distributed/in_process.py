"""Trains with one worker in this process, without Ray; `worker_group` trains with Ray Train.

Without Ray, a training starts several seconds earlier, and Ray's processes use no CPU time. The
training loop, the run folder and the reported epochs are the same with and without Ray, so a run
can begin here and resume on Ray, or the other way round.

Ray Train's local mode (`num_workers=0`) needs no cluster either. It is not used, because it calls
no callbacks, and neither stores checkpoints nor resumes from them. Importing Ray Train also takes
several seconds.
"""

import logging
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager

import torch
from safetensors import SafetensorError

from ser_ray.cluster.resources import available_memory, cpus_per_worker, openmp_threads
from ser_ray.distributed.ingest import fetch_by_threads, should_stream
from ser_ray.distributed.node_metrics import NodeMetrics
from ser_ray.distributed.run_folder import Epoch, OnEpoch, RunFolder, StoredCheckpoint, TrainingTask
from ser_ray.errors import SerRayError, first_line, is_permanent
from ser_ray.training.checkpoint import Snapshot
from ser_ray.training.loop import MakeSnapshot, fit
from ser_ray.training.trainer import EpochReport

ADDRESS = "127.0.0.1"
"""Name of this machine in its system metrics: the address that a local Ray gives its only node."""
FAILURES = (SerRayError, OSError, MemoryError, RuntimeError, SafetensorError)
"""Errors that the machine, its GPU or its storage may cause. CUDA raises RuntimeError."""
RETRY_SECONDS = 5.0
"""Time between a failure and the next attempt."""

logger = logging.getLogger(__name__)


def train_in_process(task: TrainingTask, on_epoch: OnEpoch, *, gpu: bool) -> None:
    """Train in this process until all epochs have ended.

    Args:
        task: the training.
        on_epoch: called with every epoch, first with the epochs of the checkpoint to resume from.
            After a failure, it may be called again with the same epoch. For new epochs, it is
            called in the thread that stores checkpoints. If it raises an error, the training ends.
        gpu: whether to use a GPU.

    Raises:
        LockLostError: another process has taken over the folder.
        SerRayError: the training failed.
    """
    failures = 0
    while True:
        reporter = LocalReporter(task.folder, on_epoch)
        try:
            with closing(reporter):
                start = task.folder.restore(reporter.pass_on)
                _fit(task, start, reporter, gpu=gpu)
        except FAILURES as error:
            if error is reporter.on_epoch_error:
                raise
            if is_permanent(error) or failures == task.run.max_failures:
                if isinstance(error, SerRayError):
                    raise
                trace = "".join(traceback.format_exception(error))
                raise task.folder.failure(trace) from error
            failures += 1
            logger.warning(
                "the training failed (%s); it is tried again from the newest checkpoint, if any",
                first_line(error),
            )
            time.sleep(RETRY_SECONDS)
        else:
            return


def _fit(
    task: TrainingTask, start: StoredCheckpoint | None, reporter: "LocalReporter", *, gpu: bool
) -> None:
    recipe, shards = task.recipe, task.shards
    with worker_device(gpu=gpu) as device, task.folder.local(start) as resume:
        is_streamed = should_stream(
            task.run.ingest, recipe, shards, available_memory, device, resume
        )
        fit(
            recipe,
            shards,
            task.pretrained,
            reporter,
            resume=resume,
            device=device,
            stream=fetch_by_threads if is_streamed else None,
        )
        reporter.wait()


class LocalReporter:
    """Stores the checkpoints of a training in another thread, while the training continues.

    Args:
        folder: the run folder.
        on_epoch: called in the other thread with every epoch whose checkpoint has been stored.
    """

    def __init__(self, folder: RunFolder, on_epoch: OnEpoch) -> None:
        self.folder, self.on_epoch = folder, on_epoch
        self.on_epoch_error: BaseException | None = None
        """The error that `on_epoch` raised; None if it raised none."""
        self._node = NodeMetrics()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def __call__(self, report: EpochReport | None, make_snapshot: MakeSnapshot) -> None:
        """Wait until the previous checkpoint is stored, then start to store the new one."""
        self.wait()
        assert report is not None, "checkpoints in mid-epoch are made only on Ray, at preemptions"
        metrics = {ADDRESS: self._node.means_since_last_call()}
        epoch = Epoch(report.row, report.learning_rates, report.timestamp_ms, metrics)
        self._writing = self._writer.submit(self._store, make_snapshot(), epoch)

    def wait(self) -> None:
        """Wait until the last checkpoint is stored. If the other thread failed, raise its error.

        Raises:
            LockLostError: another process has taken over the folder.
            OSError: the checkpoint could not be stored.
            Exception: the error that `on_epoch` raised.
        """
        if self._writing is not None:
            self._writing.result()

    def close(self) -> None:
        """Finish the checkpoint that is being written, and end the threads."""
        self._node.close()
        self._writer.shutdown()

    def _store(self, snapshot: Snapshot, epoch: Epoch) -> None:
        self.folder.check_lock()
        snapshot.store(self.folder.filesystem, f"{self.folder.path}/{snapshot.name}")
        self.folder.tidy(StoredCheckpoint(snapshot.name, snapshot.progress))
        self.pass_on(epoch)

    def pass_on(self, epoch: Epoch) -> None:
        """Call `on_epoch`, and keep the error if it raises one."""
        try:
            self.on_epoch(epoch)
        except BaseException as error:
            self.on_epoch_error = error
            raise


@contextmanager
def worker_device(*, gpu: bool) -> Iterator[torch.device]:
    """Yield the device to train on.

    In the block, torch uses OMP_NUM_THREADS threads, or else one for each CPU of a worker.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(openmp_threads() or cpus_per_worker(1))
    try:
        yield torch.device("cuda" if gpu else "cpu")
    finally:
        torch.set_num_threads(before)
