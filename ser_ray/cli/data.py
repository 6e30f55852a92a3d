"""The verbs download and prepare."""

from dataclasses import dataclass, field

from ser_ray import api
from ser_ray.cli.verb import Verb, VerbResult, say
from ser_ray.command import next_command
from ser_ray.corpus.ravdess.download import DownloadConfig
from ser_ray.shards.config import PrepareConfig


@dataclass(frozen=True, kw_only=True)
class Download(Verb):
    """Download RAVDESS from its Zenodo record; complete files are not downloaded again."""

    download: DownloadConfig = field(default_factory=DownloadConfig)
    resumes = True

    def run(self) -> VerbResult:
        """Download and unpack the archives."""
        target = self.download.target
        say("download", f"{', '.join(self.download.archive_names)} into {target}")
        folders = [str(folder) for folder in api.download(self.download)]
        text = "\n".join(f"complete     {folder}" for folder in folders)
        command = next_command("prepare", corpus=target)
        return VerbResult({"folders": folders}, text, f"prepare it   {command}")


@dataclass(frozen=True, kw_only=True)
class Prepare(Verb):
    """Decode a corpus into Parquet shards of features."""

    prepare: PrepareConfig
    resumes = True

    def run(self) -> VerbResult:
        """Prepare the shards, and count the files by outcome."""
        from ser_ray.corpus.folds import suggest_protocol
        from ser_ray.corpus.ravdess.census import compare_with_ravdess

        say("prepare", f"{self.prepare.corpus} into {self.prepare.shards}")
        summary = api.prepare(self.prepare, address=self.common.address)
        card, lines = summary.card, [str(summary)]
        shards, protocol = api.open_shards(self.prepare.shards), ""
        if card.corpus == "ravdess":
            lines.append(compare_with_ravdess(shards.outcomes()))
        elif card.corpus == "table":
            protocol = suggest_protocol(shards.clips())
        data = {
            "shards": self.prepare.shards,
            "files": card.num_files,
            "clips": shards.num_clips,
            "outcomes": card.counts,
            "fingerprint": card.fingerprint,
            "seconds": summary.seconds,
            "warnings": list(summary.warnings),
        }
        lines.append(f"shards       {self.prepare.shards}")
        command = next_command("train", shards=self.prepare.shards, protocol=protocol)
        return VerbResult(data, "\n".join(lines), f"train on it  {command}")
