"""Runs a learning-rate range test in this process or, on a cluster, in one Ray task."""

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass

from ser_ray.cluster.connect import cluster, needs_ray
from ser_ray.cluster.resources import cpus_per_worker, in_words, require_workers, trains_on_gpus
from ser_ray.cluster.shared_files import require_shared
from ser_ray.distributed.local import FAILURES, worker_device
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
from ser_ray.tracking.about import run_tags, scored_on
from ser_ray.tracking.registry import read_initial_weights
from ser_ray.tracking.store import require_server
from ser_ray.tracking.tracker import Tracker, flatten, now_ms
from ser_ray.training.config import LrRangeConfig, TrainConfig
from ser_ray.training.lr_range import LrRange, propose, range_steps
from ser_ray.training.model import Pretrained
from ser_ray.training.parts import describe_split, select_rows


@dataclass(frozen=True, slots=True)
class RangeResult:
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


def find_range(
    shards_location: str | Sequence[str],
    config: TrainConfig,
    run: RunConfig,
    test: LrRangeConfig,
    *,
    address: str = "",
) -> RangeResult:
    """Propose bounds for a recipe's learning rate. One worker runs the test, if possible on a GPU.

    Raises:
        ShardsError, ConfigError, ResourcesError, TrackingError: before the test starts.
        DivergedError: the loss did not fall at any learning rate.
    """
    shards = open_corpora(shards_location, config.label_map)
    split = describe_split(select_rows(shards.clips(), config))
    pretrained = read_initial_weights(config, shards, run.tracking_uri)
    require_server(run.tracking_uri)
    on_ray = needs_ray(address)
    with cluster(address) if on_ray else nullcontext():
        require_shared(*shards.locations)
        gpu = trains_on_gpus(run.device)
        require_workers(1, cpus=1, gpus=1 if gpu else 0)
        name = run.name or f"lr-range-{config.feature}-{config.fingerprint}"
        tags = run_tags("range test", split["label"], shards)
        params = config.to_dict() | {"lr_range": asdict(test)}
        about = "a learning-rate range test, which proposes lr_min and lr_max"
        folder = RunFolder(absolute(run.storage), name)
        tracker = start_run(folder, run, shards, tags, params, about)
        steps = (_steps_on_ray if on_ray else _steps)(config, shards, pretrained, test, gpu)
        try:
            with closing(steps):
                found = propose(*_follow(steps, test))
            page = range_page(
                name, asdict(found), settings=flatten(params), tags=tags, run_id=tracker.run_id
            )
            store_page(page, folder.report)
            _record(tracker, found, page, tags)
        except BaseException as error:
            tracker.abandon(error)
            raise
        tracker.finish("FINISHED")
    return RangeResult(found, split["label"], tracker.run_id, tracker.uri, folder.report)


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


def _steps_on_ray(
    config: TrainConfig, shards: ShardSet, pretrained: Pretrained, test: LrRangeConfig, gpu: bool
) -> Generator[tuple[float, float]]:
    """Yield the learning rate and the loss of every step, from a Ray task."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    from ser_ray.distributed.room import placed

    def run() -> Iterator[tuple[float, float] | SerRayError]:
        try:
            yield from _steps(config, shards, pretrained, test, gpu)
        except SerRayError as problem:  # if it were raised, Ray would wrap it
            yield problem

    cpus, gpus = (1, 1) if gpu else (cpus_per_worker(1), 0)
    bundle: dict[str, float] = {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}
    try:
        with placed(bundle, f"a range test with {in_words(bundle)}") as room:
            task = ray.remote(
                num_returns="streaming",
                num_cpus=cpus,
                num_gpus=gpus,
                scheduling_strategy=PlacementGroupSchedulingStrategy(room),
            )(run)
            for reference in task.remote():
                step = ray.get(reference)
                if isinstance(step, SerRayError):
                    raise step
                yield step
    except ray.exceptions.RayError as error:
        raise SerRayError(f"the range test failed: {first_line(error)}") from error


def _follow(
    steps: Iterable[tuple[float, float]], test: LrRangeConfig
) -> tuple[list[float], list[float]]:
    """Show the progress of the steps; return their learning rates and losses."""
    rates: list[float] = []
    losses: list[float] = []
    with show_progress() as report:
        for step in steps:
            rates.append(step[0])
            losses.append(step[1])
            text = f"step {len(rates)} of {test.steps}, learning rate {step[0]:.1e}"
            report(f"{text}, loss {step[1]:.3f}", len(rates), test.steps)
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
    tracker.log_files(
        {
            REPORT: page,
            "plots/lr_range.png": range_figure(asdict(found), f"training loss, {scored_on(tags)}"),
            "tables/lr_range.json": asdict(found),
        }
    )
