"""Runs a learning-rate range test, in this process or in one Ray task.

From shards and a recipe, the test proposes bounds of the learning rate. It writes a page and an
MLflow run.
"""

from collections.abc import Generator, Iterable, Mapping
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass

from ser_ray.cluster.connect import cluster, needs_ray
from ser_ray.cluster.resources import (
    cpus_per_worker,
    format_resources,
    require_workers,
    trains_on_gpus,
)
from ser_ray.cluster.shared_files import require_kept, require_shared
from ser_ray.distributed.in_process import FAILURES, worker_device
from ser_ray.distributed.mlflow_run import start_run
from ser_ray.distributed.run_config import RunConfig
from ser_ray.distributed.run_folder import RunFolder
from ser_ray.errors import SerRayError, first_line, wrapped_error
from ser_ray.evaluation.evaluation import REPORT
from ser_ray.evaluation.pages import range_page
from ser_ray.evaluation.rendering import notebook_cell, store_page
from ser_ray.plots.training import range_figure
from ser_ray.progress import show_progress
from ser_ray.shards.config import ShardLocations
from ser_ray.shards.corpora import open_corpora
from ser_ray.shards.read import ShardSet
from ser_ray.storage.paths import absolute
from ser_ray.tracking.registry import read_initial_weights
from ser_ray.tracking.run_metadata import run_tags, scored_on
from ser_ray.tracking.store import require_server
from ser_ray.tracking.tracker import Tracker, now_ms
from ser_ray.training.lr_range import LrRange, propose_bounds, range_steps
from ser_ray.training.model import Pretrained
from ser_ray.training.parts import select_rows
from ser_ray.training.recipe import LrRangeConfig, TrainConfig


@dataclass(frozen=True, slots=True)
class LrRangeResult:
    """The outcome of a range test, and its MLflow run."""

    proposal: LrRange
    label: str
    run_id: str
    tracking_uri: str
    report: str
    """Path or URI of the test's page."""

    @property
    def bounds(self) -> tuple[float, float]:
        """The proposed lr_min and lr_max, rounded to two significant digits."""
        return float(f"{self.proposal.lr_min:.1e}"), float(f"{self.proposal.lr_max:.1e}")

    def __repr__(self) -> str:
        rates, (lr_min, lr_max) = self.proposal.learning_rates, self.bounds
        return (
            f"range test   {self.label}: {len(rates)} steps, {rates[0]:.0e} to {rates[-1]:.0e}\n"
            f"proposed     --lr-min {lr_min:g} --lr-max {lr_max:g}\n"
            f"report       {self.report}"
        )

    def _repr_html_(self) -> str:
        return notebook_cell(repr(self), self.report)


def run_lr_range(
    shards_location: ShardLocations,
    recipe: TrainConfig,
    run: RunConfig,
    test: LrRangeConfig,
    *,
    address: str = "",
) -> LrRangeResult:
    """Propose bounds for a recipe's learning rate. The test runs in one worker.

    Args:
        shards_location: folder or URI of the shard set, or of several that are read as one.
        test: the learning rates to try.
        address: Ray cluster to join (`ser_ray.cluster.connect.needs_ray`).

    Raises:
        ShardsError, ConfigError, CheckpointError, ResourcesError: raised before the test starts.
        TrackingError: the tracking store cannot be used.
        DivergedError: the loss did not fall at any learning rate.
        SerRayError: the test failed; the message gives the reason.
    """
    shards = open_corpora(shards_location, recipe.label_map)
    label = select_rows(shards.clips(), recipe).label
    pretrained = read_initial_weights(recipe, shards, run.tracking_uri)
    require_server(run.tracking_uri)
    on_ray = needs_ray(address)
    with cluster(address) if on_ray else nullcontext():
        require_shared(*shards.locations)
        require_kept(run.storage)
        gpu = trains_on_gpus(run.device)
        require_workers(1, cpus=1, gpus=1 if gpu else 0)
        folder = _new_folder(run, run.name or f"lr-range-{recipe.feature}-{recipe.fingerprint}")
        tags = run_tags("range test", label, shards)
        params = recipe.to_dict() | {"lr_range": asdict(test)}
        about = "a learning-rate range test, which proposes lr_min and lr_max"
        # The lock and the identity keep trainings and other tests out of the folder.
        with folder.lock(), start_run(folder, run, shards, tags, params, about, params) as tracker:
            run_steps = _steps_on_ray if on_ray else _steps
            with closing(run_steps(recipe, shards, pretrained, test, gpu)) as steps:
                proposal = propose_bounds(*_show_steps(steps, test))
            page = range_page(
                folder.name,
                asdict(proposal),
                recipe=recipe,
                test=asdict(test),
                tags=tags,
                run_id=tracker.run_id,
            )
            store_page(page, folder.report)
            _record(tracker, proposal, page, tags)
            tracker.finish("FINISHED")
    return LrRangeResult(proposal, label, tracker.run_id, tracker.uri, folder.report)


def _new_folder(run: RunConfig, name: str) -> RunFolder:
    """Return the first of the folders NAME, NAME-2, NAME-3, ... that no run uses."""
    folder, number = RunFolder(absolute(run.storage), name), 1
    while folder.is_used():
        number += 1
        folder = RunFolder(absolute(run.storage), f"{name}-{number}")
    return folder


def _steps(
    recipe: TrainConfig, shards: ShardSet, pretrained: Pretrained, test: LrRangeConfig, gpu: bool
) -> Generator[tuple[float, float]]:
    """Run the test in this process; yield the learning rate and the loss of every step."""
    try:
        with worker_device(gpu=gpu) as device:
            yield from range_steps(recipe, shards, pretrained, test, device)
    except SerRayError:
        raise
    except FAILURES as error:
        raise SerRayError(f"the range test failed: {first_line(error)}") from error


def _steps_on_ray(
    recipe: TrainConfig, shards: ShardSet, pretrained: Pretrained, test: LrRangeConfig, gpu: bool
) -> Generator[tuple[float, float]]:
    """Run the test in a Ray task; yield the learning rate and the loss of every step."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    from ser_ray.distributed.placement import reserve

    resources = {"CPU": 1.0, "GPU": 1.0} if gpu else {"CPU": float(cpus_per_worker(1))}
    try:
        with reserve(resources, f"a range test with {format_resources(resources)}") as group:
            task = ray.remote(
                num_returns="streaming",
                num_cpus=resources["CPU"],
                num_gpus=resources.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(group),
            )(_steps)
            steps = task.remote(recipe, shards, ray.put(pretrained), test, gpu)
            yield from map(ray.get, steps)
    except ray.exceptions.RayError as error:
        if user_error := wrapped_error(error):
            raise user_error from None
        raise SerRayError(f"the range test failed: {first_line(error)}") from error


def _show_steps(
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


def _record(tracker: Tracker, proposal: LrRange, page: str, tags: Mapping[str, str]) -> None:
    lr_min, lr_max, now = proposal.lr_min, proposal.lr_max, now_ms()
    for step, (rate, loss) in enumerate(zip(proposal.learning_rates, proposal.losses, strict=True)):
        tracker.log_metrics({"train/lr": rate, "train/loss": loss}, step, now)
    tracker.log_metrics({"proposed/lr_min": lr_min, "proposed/lr_max": lr_max}, 0, now)
    tracker.deliver()
    tracker.describe(Result=f"lr_min {lr_min:.1e}, lr_max {lr_max:.1e} ({scored_on(tags)})")
    numbers = asdict(proposal)
    figure = range_figure(numbers, f"training loss, {scored_on(tags)}")
    tracker.log_files({REPORT: page, "plots/lr_range.png": figure, "tables/lr_range.json": numbers})
