"""Runs a learning-rate range test in this process or, on a cluster, in one Ray task."""

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from functools import partial

from ser_ray.cluster.connect import cluster, needs_ray
from ser_ray.cluster.resources import (
    cpus_per_worker,
    format_resources,
    require_workers,
    trains_on_gpus,
)
from ser_ray.cluster.shared_files import require_shared
from ser_ray.distributed.in_process import FAILURES, worker_device
from ser_ray.distributed.mlflow_run import start_run
from ser_ray.distributed.run_config import RunConfig
from ser_ray.distributed.run_folder import RunFolder
from ser_ray.errors import SerRayError, first_line
from ser_ray.evaluation.evaluation import REPORT
from ser_ray.evaluation.pages import range_page
from ser_ray.evaluation.rendering import store_page
from ser_ray.plots.training import range_figure
from ser_ray.progress import show_progress
from ser_ray.shards.corpora import open_corpora
from ser_ray.shards.read import ShardSet
from ser_ray.storage.paths import absolute
from ser_ray.tracking.registry import read_initial_weights
from ser_ray.tracking.run_metadata import run_tags, scored_on
from ser_ray.tracking.store import require_server
from ser_ray.tracking.tracker import Tracker, flatten, now_ms
from ser_ray.training.lr_range import LrRange, propose, range_steps
from ser_ray.training.model import Pretrained
from ser_ray.training.parts import select_rows
from ser_ray.training.recipe import LrRangeConfig, TrainConfig

Steps = Callable[[], Generator[tuple[float, float]]]
"""Starts a test, which yields the learning rate and the loss of every step."""


@dataclass(frozen=True, slots=True)
class LrRangeResult:
    """A finished range test and its MLflow run."""

    found: LrRange
    label: str
    run_id: str
    tracking_uri: str
    report: str
    """Location of the test's page."""

    @property
    def bounds(self) -> tuple[float, float]:
        """The proposed learning rates, lr_min and lr_max, with two digits."""
        return float(f"{self.found.lr_min:.1e}"), float(f"{self.found.lr_max:.1e}")

    def __repr__(self) -> str:
        rates, (lr_min, lr_max) = self.found.learning_rates, self.bounds
        return (
            f"range test   {self.label}: {len(rates)} steps, {rates[0]:.0e} to {rates[-1]:.0e}\n"
            f"proposed     --lr-min {lr_min:g} --lr-max {lr_max:g}\n"
            f"report       {self.report}"
        )


def run_lr_range(
    shards_location: str | Sequence[str],
    config: TrainConfig,
    run: RunConfig,
    test: LrRangeConfig,
    *,
    address: str = "",
) -> LrRangeResult:
    """Propose bounds for a recipe's learning rate. One worker runs the test, if possible on a GPU.

    Raises:
        ShardsError, ConfigError, ResourcesError, TrackingError: before the test starts.
        DivergedError: the loss did not fall at any learning rate.
    """
    shards = open_corpora(shards_location, config.label_map)
    label = select_rows(shards.clips(), config).label
    pretrained = read_initial_weights(config, shards, run.tracking_uri)
    require_server(run.tracking_uri)
    on_ray = needs_ray(address)
    with cluster(address) if on_ray else nullcontext():
        require_shared(*shards.locations)
        gpu = trains_on_gpus(run.device)
        require_workers(1, cpus=1, gpus=1 if gpu else 0)
        folder = _new_folder(run, run.name or f"lr-range-{config.feature}-{config.fingerprint}")
        tags = run_tags("range test", label, shards)
        params = config.to_dict() | {"lr_range": asdict(test)}
        about = "a learning-rate range test, which proposes lr_min and lr_max"
        with start_run(folder, run, shards, tags, params, about) as tracker:
            in_process = partial(_steps, config, shards, pretrained, test, gpu)
            with closing(_on_ray(in_process, gpu) if on_ray else in_process()) as steps:
                found = propose(*_follow(steps, test))
            page = range_page(
                folder.name,
                asdict(found),
                settings=flatten(params),
                tags=tags,
                run_id=tracker.run_id,
            )
            store_page(page, folder.report)
            _record(tracker, found, page, tags)
            tracker.finish("FINISHED")
    return LrRangeResult(found, label, tracker.run_id, tracker.uri, folder.report)


def _new_folder(run: RunConfig, name: str) -> RunFolder:
    """Return the first of the folders NAME, NAME-2, NAME-3, ... that does not exist."""
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    folders = (RunFolder(absolute(run.storage), name) for name in names)
    return next(folder for folder in folders if not folder.exists())


def _steps(
    config: TrainConfig, shards: ShardSet, pretrained: Pretrained, test: LrRangeConfig, gpu: bool
) -> Generator[tuple[float, float]]:
    """Yield the learning rate and the loss of every step."""
    try:
        with worker_device(gpu=gpu) as device:
            yield from range_steps(config, shards, pretrained, test, device)
    except SerRayError:
        raise
    except FAILURES as error:
        raise SerRayError(f"the range test failed: {first_line(error)}") from error


def _on_ray(steps: Steps, gpu: bool) -> Generator[tuple[float, float]]:
    """Yield the learning rate and the loss of every step, from a Ray task."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    from ser_ray.distributed.placement import placed

    def run() -> Iterator[tuple[float, float]]:
        yield from steps()

    bundle = {"CPU": 1.0, "GPU": 1.0} if gpu else {"CPU": float(cpus_per_worker(1))}
    try:
        with placed(bundle, f"a range test with {format_resources(bundle)}") as room:
            task = ray.remote(
                num_returns="streaming",
                num_cpus=bundle["CPU"],
                num_gpus=bundle.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(room),
            )(run)
            yield from map(ray.get, task.remote())
    except ray.exceptions.RayError as error:
        if isinstance(cause := getattr(error, "cause", None), SerRayError):
            raise cause from None
        raise SerRayError(f"the range test failed: {first_line(error)}") from error


def _follow(
    steps: Iterable[tuple[float, float]], test: LrRangeConfig
) -> tuple[list[float], list[float]]:
    """Show the progress of the steps; return their learning rates and losses."""
    rates: list[float] = []
    losses: list[float] = []
    with show_progress("steps") as report:
        for done, (rate, loss) in enumerate(steps, start=1):
            rates.append(rate)
            losses.append(loss)
            text = f"step {done} of {test.steps}, learning rate {rate:.1e}, loss {loss:.3f}"
            report(text, done, test.steps)
    return rates, losses


def _record(tracker: Tracker, found: LrRange, page: str, tags: Mapping[str, str]) -> None:
    when = now_ms()
    for step, (rate, loss) in enumerate(zip(found.learning_rates, found.losses, strict=True)):
        tracker.log_metrics({"train/lr": rate, "train/loss": loss}, step, when)
    tracker.log_metrics({"proposed/lr_min": found.lr_min, "proposed/lr_max": found.lr_max}, 0, when)
    tracker.deliver()
    tracker.describe(
        Result=f"lr_min {found.lr_min:.1e}, lr_max {found.lr_max:.1e} ({scored_on(tags)})"
    )
    numbers = asdict(found)
    figure = range_figure(numbers, f"training loss, {scored_on(tags)}")
    tracker.log_files({REPORT: page, "plots/lr_range.png": figure, "tables/lr_range.json": numbers})
