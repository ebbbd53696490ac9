"""The workers of one process: each fills one shard at a time and writes it down in the journal."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.checkpoint.writer import ShardWriter
from dsv3_tools.conversion.devices import largest_whole_nbytes
from dsv3_tools.conversion.fetching import PREFETCH, Fetcher, SourceShard
from dsv3_tools.conversion.findings import Findings
from dsv3_tools.conversion.making import MadeWeights
from dsv3_tools.conversion.options import RunOptions
from dsv3_tools.conversion.pieces import Origin
from dsv3_tools.conversion.plan import Plan, ShardPlan
from dsv3_tools.conversion.preflight import check_scales
from dsv3_tools.conversion.progress import Meter, Stop
from dsv3_tools.conversion.ranks import Ranks
from dsv3_tools.conversion.uploading import Finished, Uploader
from dsv3_tools.conversion.workers import Pipeline, work_off
from dsv3_tools.conversion.workspace import JournalEntry, Workspace
from dsv3_tools.errors import Interrupted

__all__ = ["Crew"]


class Crew:
    """Everything that the workers of one run share."""

    def __init__(
        self,
        plan: Plan,
        checkpoints: Mapping[str, Checkpoint],
        workspace: Workspace,
        options: RunOptions,
        ranks: Ranks,
        devices: Sequence[str],
        workers: int,
        needs: Mapping[str, Sequence[SourceShard]],
        uploader: Uploader | None,
        made: Mapping[str, MadeWeights] | None = None,
    ) -> None:
        self._label = plan.digest[:16]
        self._largest_whole = largest_whole_nbytes(plan.shards)
        self._checkpoints = checkpoints
        self._origins: dict[str, Origin] = {**checkpoints, **(made or {})}
        self._workspace = workspace
        self._options = options
        self._ranks = ranks
        self._devices = devices
        self._stop = Stop(options.stop)
        self._pipelines_made: list[Pipeline] = []
        self._num_workers = workers
        self._written: dict[str, JournalEntry] = {}
        self._needs = needs
        self._uploader = uploader
        self._fetcher = Fetcher(
            needs,
            checkpoints,
            folder=None if options.hub.keep_source else workspace.source_folder(ranks.rank),
            window=workers + PREFETCH,
            stop=self._stop,
        )

    def work(self, todo: Sequence[ShardPlan]) -> dict[str, JournalEntry]:
        """Writes all of `todo`; returns their journal entries by name.

        Raises:
            Interrupted: a signal asked to stop.
            Dsv3Error: the first failure of a worker.
        """
        nbytes = sum(
            spec.nbytes
            for shard in todo
            for step in shard.steps
            for spec in step.input_specs(step.shape).values()
        )
        meter = Meter(nbytes, len(todo), self._options.on_progress)
        devices = [self._devices[number % len(self._devices)] for number in range(self._num_workers)]
        shared = self._ranks.world_size > 1
        try:
            with self._fetcher:
                work_off(
                    todo,
                    [partial(self._hire, device, meter) for device in devices],
                    self._stop,
                    given_up=self._workspace.has_failed if shared else lambda: False,
                )
        except BaseException as error:
            if shared:
                self._workspace.announce_failure()
            if isinstance(error, Interrupted):
                raise Interrupted(
                    error.signum,
                    f"{self._workspace.destination}: stopped; {len(self._written)} shards finished in this "
                    "run are kept, the same command goes on from there",
                ) from None
            raise
        finally:
            for pipeline in self._pipelines_made:
                pipeline.close()
        return self._written

    def _hire(self, device: str, meter: Meter) -> Callable[[ShardPlan], None]:
        """Returns a worker: a function that does one shard, on smaller slices when memory runs out."""
        candidates = self._pipelines(device, meter)
        pipeline = self._take(candidates)

        def do(shard: ShardPlan) -> None:
            nonlocal pipeline
            import torch

            self._fetch(shard)
            while True:
                try:
                    self._write(shard, pipeline)
                    break
                except torch.cuda.OutOfMemoryError:
                    pipeline.close()
                    self._pipelines_made.remove(pipeline)
                    pipeline = self._take(candidates)
            self._fetcher.release(shard.name)
            meter.add(0, shards=1)

        return do

    def _fetch(self, shard: ShardPlan) -> None:
        """Waits for what a shard is made of, and checks what could not be checked before it was here."""
        if self._needs[shard.name]:
            self._fetcher.wait(shard.name)
            check_scales([shard], self._checkpoints, nonfinite=self._options.nonfinite, stop=self._stop)

    def _take(self, candidates: Iterator[Pipeline]) -> Pipeline:
        pipeline = next(candidates)
        self._pipelines_made.append(pipeline)
        return pipeline

    def _pipelines(self, device: str, meter: Meter) -> Iterator[Pipeline]:
        """Yields pipelines in the order in which they are tried; all give the same bytes."""
        # Imported here: numba and triton take a second, and no help text or dry run needs them.
        from dsv3_tools.conversion.pipeline_cpu import CpuPipeline

        if device != "cpu":
            from dsv3_tools.conversion.pipeline_cuda import BATCH_NBYTES, CudaPipeline

            needed = self._largest_whole * 9 // 8  # and room for alignment
            for nbytes in BATCH_NBYTES:
                batch = max(nbytes, needed)
                yield CudaPipeline(self._origins, self._stop, meter, device=device, batch_nbytes=batch)
        yield CpuPipeline(self._origins, self._stop, meter, workers=self._num_workers)

    def _write(self, shard: ShardPlan, pipeline: Pipeline) -> None:
        findings = Findings(keep_nonfinite=self._options.nonfinite == "keep")
        encoded, _ = shard.header()
        final = self._workspace.destination / shard.name
        with ShardWriter(
            final,
            folder=self._workspace.folder,
            label=self._label,
            header=encoded,
            nbytes=shard.nbytes,
            hash_aside=len(os.sched_getaffinity(0)) >= 2 * self._num_workers,
        ) as writer:
            pipeline.fill(shard, writer, findings)
            self._check_sources(shard)
            sha256 = writer.commit(check=self._stop.check)
        status = final.stat()
        entry = JournalEntry(
            shard=shard.name,
            sha256=sha256,
            nbytes=shard.nbytes,
            mtime_ns=status.st_mtime_ns,
            ctime_ns=status.st_ctime_ns,
            nonfinite=dict(findings.nonfinite),
            blocks=findings.blocks,
            blocks_kept=findings.blocks_kept,
        )
        self._workspace.append_journal(entry, self._ranks.rank)
        self._written[shard.name] = entry
        if self._uploader is not None:
            self._uploader.add(Finished(entry.shard, entry.sha256))
            self._uploader.wait(self._stop.check)

    def _check_sources(self, shard: ShardPlan) -> None:
        """Refuses a shard whose source files were written to while it was made."""
        refs = {ref for step in shard.steps for ref in step.inputs.values()}
        shards = {(ref.origin, self._origins[ref.origin].weight_map[ref.name]) for ref in refs}
        for origin, name in shards:
            self._origins[origin].check_unchanged(name)
