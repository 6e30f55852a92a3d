"""Trains with one worker in this process. `ser_ray.distributed.worker_group` trains with Ray Train.

One worker on this machine does not need Ray. Ray's processes use some of the CPUs and need several
seconds to start. The loop, the run's folder and the reported epochs are the same with and without
Ray. Therefore a run can begin here and resume on Ray, or the other way round.

Ray Train's local mode (`num_workers=0`) is not used. It needs no cluster either, but it calls no
callbacks, and neither stores checkpoints nor resumes from them. Importing Ray Train also takes
seconds.
"""

import logging
import os
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager

import torch
from safetensors import SafetensorError

from ser_ray.cluster.resources import available_memory, cpus_per_worker
from ser_ray.distributed.ingest import fetch_by_threads, streams
from ser_ray.distributed.node_metrics import NodeMetrics
from ser_ray.distributed.run_folder import Epoch, RunFolder, StoredCheckpoint, TrainingTask
from ser_ray.errors import SerRayError, first_line, is_permanent
from ser_ray.training.checkpoint import Snapshot
from ser_ray.training.loop import MakeSnapshot, fit
from ser_ray.training.trainer import EpochReport

ADDRESS = "127.0.0.1"
"""Address of this machine in the names of its metrics, as Ray has it on this machine."""
FAILURES = (SerRayError, OSError, MemoryError, RuntimeError, SafetensorError)
"""Errors that the machine, its GPU or its storage may cause. CUDA raises RuntimeError."""

logger = logging.getLogger(__name__)


def train_in_process(task: TrainingTask, on_epoch: Callable[[Epoch], None], *, gpu: bool) -> None:
    """Train in this process to the end.

    Args:
        task: the training.
        on_epoch: called with every epoch, first with the epochs of earlier starts. After a failure,
            it may be called again with the same epoch. For new epochs, it is called in the thread
            that stores their checkpoints. If it raises an error, the training ends.
        gpu: whether to use a GPU.

    Raises:
        CheckpointError: another process has taken over the folder.
        SerRayError: the training failed.
    """
    failures = 0
    while True:
        start = task.folder.restore(on_epoch)
        reporter = LocalReporter(task.folder, on_epoch)
        try:
            with closing(reporter):
                _fit(task, start, reporter, gpu=gpu)
        except FAILURES as error:
            if error is reporter.refusal:
                raise
            if is_permanent(error) or failures == task.run.max_failures:
                if isinstance(error, SerRayError):
                    raise
                trace = "".join(traceback.format_exception(error))
                raise task.folder.failure(trace) from error
            failures += 1
            reason = first_line(error)
            logger.warning("the training failed (%s): it resumes from the last epoch", reason)
        else:
            return


def _fit(
    task: TrainingTask, start: StoredCheckpoint | None, reporter: "LocalReporter", *, gpu: bool
) -> None:
    config, shards = task.config, task.shards
    with worker_device(gpu=gpu) as device, task.folder.local(start) as resume:
        memory = available_memory
        is_streamed = streams(task.run.ingest, config, shards, memory, device, resume)
        fit(
            config,
            shards,
            task.pretrained,
            reporter,
            resume=resume,
            device=device,
            stream=fetch_by_threads if is_streamed else None,
        )
        reporter.wait()


class LocalReporter:
    """Stores checkpoints and passes on epochs in another thread, while the loop continues.

    Args:
        on_epoch: called in the other thread with every epoch whose checkpoint is stored.
    """

    def __init__(self, folder: RunFolder, on_epoch: Callable[[Epoch], None]) -> None:
        self.folder, self.on_epoch = folder, on_epoch
        self.refusal: BaseException | None = None
        """The error that `on_epoch` raised."""
        self._node = NodeMetrics()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def __call__(self, report: EpochReport | None, make_snapshot: MakeSnapshot) -> None:
        """Wait until the previous checkpoint is stored, then start to store this epoch's."""
        self.wait()
        assert report is not None, "only Ray announces preemptions, so no report is in mid-epoch"
        metrics = {ADDRESS: self._node.means_since_last_call()}
        epoch = Epoch(report.row, report.learning_rates, report.timestamp_ms, metrics)
        self._writing = self._writer.submit(self._store, make_snapshot(), epoch)

    def wait(self) -> None:
        """Wait until the last checkpoint is stored. If that failed, raise the error.

        Raises:
            CheckpointError: another process has taken over the folder.
        """
        if self._writing is not None:
            self._writing.result()

    def close(self) -> None:
        """End the threads, and finish the checkpoint that is being written."""
        self._node.close()
        self._writer.shutdown()

    def _store(self, snapshot: Snapshot, epoch: Epoch) -> None:
        self.folder.check_lock()
        snapshot.store(self.folder.filesystem, f"{self.folder.path}/{snapshot.name}")
        self.folder.tidy(StoredCheckpoint(snapshot.name, snapshot.progress))
        try:
            self.on_epoch(epoch)
        except BaseException as error:
            self.refusal = error
            raise


@contextmanager
def worker_device(*, gpu: bool) -> Iterator[torch.device]:
    """Yield the device of this process, with as many torch threads as a Ray worker has."""
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or cpus_per_worker(1)))
    try:
        yield torch.device("cuda" if gpu else "cpu")
    finally:
        torch.set_num_threads(before)
