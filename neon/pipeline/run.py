"""Neon from a config: synth -> finetune -> select -> report -> merged file -> one page. Every stage resumes."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from neon import contract, merge
from neon.checkpoints import checkpoint
from neon.config_table import to_plain
from neon.evaluation.evaluate import Yardstick
from neon.evaluation.options import Report
from neon.evaluation.yardsticks import open_yardsticks
from neon.family import Family, num_classes_of
from neon.own_code import source_sha256
from neon.pipeline.base_model import load_network, read_base
from neon.pipeline.check import check_first_images
from neon.pipeline.experiment import Base, Experiment
from neon.pipeline.judging import Judge, calls_per_image, timed
from neon.pipeline.preflight import Stage, preflight
from neon.report import page
from neon.report.result import Result, diagnosis_against_search
from neon.runtime.distributed import World
from neon.runtime.progress import say
from neon.sampling.generate import Source
from neon.sampling.options import Labels, Sampling, Synth
from neon.sampling.synthesize import synthesize
from neon.search.choose import Choice
from neon.search.ledger import Ledger
from neon.search.options import Select
from neon.search.points import Point, Score
from neon.store import files, records
from neon.store.shards import Corpus, Shards
from neon.training.encoding import encoded
from neon.training.loop import is_finished, snapshots, train
from neon.training.recipe import Training
from neon.training.trainer import Trainer

LOG = logging.getLogger(__name__)
DIAGNOSIS = "diagnose.json"
"""What `neon diagnose` left in the run's folder."""


class Run:
    """One experiment in one folder. Its stages may be called one by one (`neon synth`, `neon finetune`, `neon search`)
    or all.

    family, yardsticks: in place of those that the config names (neon/library/improve.py makes both from functions).
    is_kept: whether the folder outlives the call, so that its page may be named.
    """

    def __init__(
        self,
        config: Experiment,
        folder: Path,
        world: World,
        *,
        family: Family | None = None,
        yardsticks: Sequence[Yardstick] | None = None,
        is_kept: bool = True,
    ):
        self.config, self.folder, self.world = config, folder, world
        self.family = config.family() if family is None else family
        self._yardsticks, self.is_kept = yardsticks, is_kept
        self.sampling = config.need("sampling", Sampling)
        self.base_config = config.need("base", Base)

    @cached_property
    def base(self) -> checkpoint.Checkpoint:
        return read_base(self.config, self.family)

    @cached_property
    def base_tensors(self) -> dict[str, Tensor]:
        """The base's tensors in memory, as the built model names and orders them."""
        return {name: value.detach().cpu().clone() for name, value in self.model.state_dict().items()}

    @cached_property
    def model(self) -> torch.nn.Module:
        self.family.open(self.base_config.autoencoder_path, self.world.device)
        return load_network(self.base, self.family).to(self.world.device).eval().requires_grad_(False)

    @property
    def num_classes(self) -> int:
        """Of the network; 0 if it takes no labels."""
        return num_classes_of(self.family, self.model)

    @cached_property
    def identity(self) -> dict[str, object]:
        """What every image of this run depends on."""
        autoencoder = self.base_config.autoencoder_path
        return {
            "family": self.config.family_name,
            "base_sha256": self.base.sha256,
            "weights": self.base.weights,
            "autoencoder_sha256": None if autoencoder is None else files.sha256_of(autoencoder),
            "sampling": to_plain(self.sampling),
            **({"model": to_plain(self.base.arch)} if self.base.is_arch_given else {}),
        } | self._family_source

    @property
    def _family_source(self) -> dict[str, object]:
        source = source_sha256(type(self.family))
        return {} if source is None else {"family_source": source}

    def source(
        self, labels: Labels, first_seed: int, cfg_scale: float | None = None, sampling: Sampling | None = None
    ) -> Source:
        return Source(
            family=self.family,
            sampling=sampling or self.sampling,
            labels=labels,
            first_seed=first_seed,
            num_classes=self.num_classes,
            cfg_scale=cfg_scale,
        )

    def synth(self) -> Shards:
        """Stage 1: S."""
        self._preflight(["synth"])
        config = self.config.need("synth", Synth)
        say(self.world, f"synth: {config.num_images} images by the base model")
        sampling = config.sampling or self.sampling
        check_first_images(self.config, self.family, self.model, self.world.device)
        source = self.source(config.labels, config.first_seed, config.cfg_scale, sampling)
        with timed(self.folder, "synth", self.world):
            return synthesize(source, self.model, config, self.folder / "synth", self._identity_of_synth, self.world)

    @property
    def _identity_of_synth(self) -> dict[str, object]:
        """What S depends on, besides its size and how it is stored."""
        config = self.config.need("synth", Synth)
        named = {"labels": config.labels, "first_seed": config.first_seed, "cfg_scale": config.cfg_scale}
        return {**self.identity, "sampling": to_plain(config.sampling or self.sampling), **named}

    def finetune(self) -> list[Path]:
        """Stage 2: the short fine-tune on S. Returns the snapshots."""
        self._preflight(["synth", "finetune"])
        recipe = self.config.need("finetune", Training)
        synth_config = self.config.need("synth", Synth)
        self.model  # noqa: B018 - opens the family, which comes before whatever it builds
        if recipe.arch or source_sha256(type(self.family)) is not None:  # the shipped ones' tests have done this
            with torch.random.fork_rng(devices=[]):  # what is made here is thrown away
                self._plain(self._trainable_model(recipe).state_dict())  # what does not fit is said before S is made
        corpus = self.synth()
        folder = self.folder / "finetune"
        synth_manifest = records.read_manifest(self.folder / "synth")
        identity = {"finetune": to_plain(recipe), "synth": synth_manifest}
        if self.world.broadcast(self.world.is_main and is_finished(folder, recipe, identity)):
            say(self.world, f"finetune: found finished in {folder}")
            return snapshots(folder)
        for yardstick in self._yardsticks or ():
            yardstick.try_out(corpus, self.config.need("select", Select).num_images)
        codes: Corpus = corpus
        if synth_config.store == "images":
            codes = encoded(
                self.family, corpus, folder / "encoded", {"synth": synth_manifest}, self.world, self.sampling.batch
            )
        say(self.world, f"finetune: {recipe.images} images seen, batch {recipe.batch}, lr {recipe.lr:g}")
        model, writer = self._trainable_model(recipe), self._snapshot_writer(recipe)
        with timed(self.folder, "finetune", self.world):
            return train(self.family, model, codes, recipe, folder, identity, writer, self.world)

    def _preflight(self, stages: Sequence[Stage]) -> None:
        self.base  # noqa: B018 - a family of many kinds of models learns from it whether this one is guided
        preflight(self.config, self.family, stages)

    def _trainable_model(self, recipe: Training) -> torch.nn.Module:
        """The base's weights in the network that the recipe trains."""
        kind = type(self.family).__name__
        try:
            built = self.family.build({**self.family.arch_of(self.base), **recipe.arch})
            model = contract.network(f"{kind}.build", built)
            self.base.load_into(model)
        except (TypeError, ValueError) as error:
            if recipe.arch:
                raise ValueError(f"finetune.arch: {error}") from error
            raise
        return contract.network(f"{kind}.adapted", self.family.adapted(model, recipe.objective))

    def _snapshot_writer(self, recipe: Training) -> Callable[[Trainer, Path], None]:
        def write(trainer: Trainer, path: Path) -> None:
            metadata = {**self._metadata("ema" if recipe.has_ema else "raw"), "images_seen": trainer.images_seen}
            checkpoint.write(path, self._plain(trainer.weights()), metadata=metadata)

        return write

    def _plain(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return contract.state(f"{type(self.family).__name__}.plain", self.family.plain(state))

    def _metadata(self, weights: str) -> dict[str, object]:
        return {
            "family": self.config.family_name,
            "arch": dict(self.family.arch_of(self.base)),
            "weights": weights,
            "base_sha256": self.base.sha256,
            "autoencoder_sha256": self.identity["autoencoder_sha256"],
            "uint8": self.sampling.uint8,
        }

    @cached_property
    def yardsticks(self) -> Sequence[Yardstick]:
        if self._yardsticks is not None:
            return self._yardsticks
        return open_yardsticks(self.config.need("report", Report), self.world.device)

    @cached_property
    def ledger(self) -> Ledger:
        shots = {path.stem.removeprefix("snapshot-"): path for path in snapshots(self.folder / "finetune")}
        if not shots:
            raise ValueError(f"{self.folder / 'finetune'}: no snapshots; run `neon finetune` first")
        protocol = {**self.identity, "metrics": [y.identity for y in self.yardsticks]}
        readers = {
            name: (files.sha256_of(path), lambda path=path: checkpoint.read(path, weights="any").tensors)
            for name, path in shots.items()
        }
        source, base = self.source("balanced", 0), self.base_tensors
        return Ledger(source, self.model, base, readers, self.yardsticks, self.folder, protocol, self.world)

    @cached_property
    def judge(self) -> Judge:
        return Judge(self.config, self.ledger, self.yardsticks, self.num_classes, self.world, self.folder)

    def check_finetuned(self) -> None:
        """Raise ValueError if the fine-tune in the folder is not finished, or of other settings than the config's."""
        folder, recipe, synth = self.folder / "finetune", self.config.finetune, self.config.synth
        if recipe is None or synth is None or not (folder / "state.pt").is_file():
            return  # snapshots that were brought here without their state: nothing is known about them
        made_on = {**self._identity_of_synth, "num_images": synth.num_images, "store": synth.store}
        identity = {"finetune": to_plain(recipe), "synth": made_on}
        if self.world.is_main and not is_finished(folder, recipe, identity):
            raise ValueError(f"{folder}: the fine-tune is not finished; `neon finetune` goes on with it")

    def select(self) -> Choice:
        """Stage 3: the search, or the grid, on the selection block."""
        self._preflight(["select"])
        paths = snapshots(self.folder / "finetune")
        names = [path.stem.removeprefix("snapshot-") for path in paths]
        steps = {name: self._step_size(name, 0.0)["relative_step"] for name in names}
        if names and steps[names[-1]] == 0:
            raise ValueError(
                f"{paths[-1]}: the fine-tune moved no weight, so that every w is the base: its gradients are zero, or "
                "its updates smaller than the weights' dtype can tell. Take a larger lr, or give the model in float32 "
                "(precision = 'bf16' then computes in bfloat16)"
            )
        if self.config.need("select", Select).snapshots == "last" or len(names) == 1:
            return self.judge.choose({names[-1]: 1.0})
        return self.judge.choose({name: step for name, step in steps.items() if step})

    def _step_size(self, snapshot: str, w: float) -> dict[str, float]:
        synth = checkpoint.read(self.folder / "finetune" / f"snapshot-{snapshot}.safetensors", weights="any")
        return merge.step_size(self.base_tensors, synth.tensors, w, [n for n, _ in self.model.named_parameters()])

    def write_merged(self, point: Point, note: str) -> Path:
        """Stage 5: theta_neon as a file that every command reads. note: what the run showed, kept in its metadata."""
        path = self.folder / "neon.safetensors"
        shot = self.folder / "finetune" / f"snapshot-{point.snapshot}.safetensors"
        if self.world.is_main:
            synth = checkpoint.read(shot, weights="any")
            parameters = {name for name, _ in self.model.named_parameters()}
            merged = merge.reverse_merge(self.base_tensors, synth.tensors, point.w, parameters=parameters)
            merged |= {later: merged[first] for later, first in merge.ties_of(self.model).items()}
            metadata = {**self._metadata(self.base.weights), "w": point.w, "synth_sha256": synth.sha256, "note": note}
            metadata["sampling"] = to_plain(
                self.source("balanced", 0, point.cfg_scale).options
            )  # what w was chosen for
            checkpoint.write(path, merged, metadata=metadata | {"is_base": point.w == 0})
            self.family.export(merged, self.folder, self.config.need("finetune", Training).objective)
        self.world.barrier()
        return path

    def all(self) -> dict[str, object]:
        """Everything; returns the result that is also written to result.json. Its verdict is the caller's to say."""
        started = time.perf_counter()
        self._preflight(["synth", "finetune", "select", "report"])
        self.yardsticks  # noqa: B018 - a missing reference or extractor is said before any image is made
        self.finetune()
        choice = self.select()
        rows, features = self.judge.report(choice)
        point = rows["neon"].point
        result = self.judge.result(choice, rows, features, self._calls_per_image)
        merged = self.write_merged(point, result.verdict.text)
        result = replace(result, about=self.about(rows["neon"], merged), diagnosis=self._diagnosis(result))
        if self.world.is_main:
            records.write_json(result.as_json(), self.folder / "result.json")
            page.write_page(result, self.folder / "report.html")
            for partial in self.folder.glob("partial-*"):  # of points that are no longer asked for
                if not partial.name.startswith("partial-eval-"):  # of `neon eval`, which may go on
                    shutil.rmtree(partial)
        self.world.barrier()
        where = f": {self.folder / 'report.html'}" if self.is_kept else ""
        say(self.world, f"done in {time.perf_counter() - started:.0f} s{where}")
        return result.as_json()

    def _calls_per_image(self, cfg_scale: float | None, sampling: Sampling | None) -> int | None:
        return calls_per_image(self.source("balanced", 0, cfg_scale, sampling), self.model, self.world.device)

    def _diagnosis(self, result: Result) -> str | None:
        path = self.folder / DIAGNOSIS
        if not path.is_file():
            return None
        try:
            return diagnosis_against_search(records.unsealed(records.read_json(path), str(path)), result)
        except records.DamagedError as error:
            LOG.warning("%s. The page says nothing of `neon diagnose`; run it again", error)
            return None

    def about(self, neon: Score, merged: Path) -> dict[str, object]:
        """What the numbers depend on, as JSON."""
        return {
            "config": to_plain(self.config),
            "hashes": {
                **{k: v for k, v in self.identity.items() if k.endswith("sha256")},
                "neon_sha256": files.sha256_of(merged),
            },
            "references": {
                y.extractor.name: {
                    "sha256": y.identity["reference_sha256"],
                    "extractor_sha256": y.identity["extractor_sha256"],
                }
                for y in self.yardsticks
            },
            "step": self._step_size(neon.point.snapshot, neon.point.w),
            **neon.made_with,
            "merged": str(merged),
        }
