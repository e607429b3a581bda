"""Which stages a document passes: those of the options, those of its source, and the user's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from data_tools.curation.dedup import DedupConfig
from data_tools.record import CurationStage
from data_tools.stages.boilerplate import BoilerplateConfig, BoilerplateStage
from data_tools.stages.decontamination.decontaminate import DecontaminateConfig, DecontaminateStage
from data_tools.stages.harm import HarmConfig, HarmStage
from data_tools.stages.language import LanguageConfig, LanguageStage
from data_tools.stages.normalize import NormalizeConfig, NormalizeStage
from data_tools.stages.own import load_stage
from data_tools.stages.pii.config import PiiConfig
from data_tools.stages.quality import QualityConfig, QualityStage
from pretrain.config.load import to_dict, validate
from pretrain.config.texts import PathText
from pretrain.errors import ConfigError

# pii comes last: its placeholders would hide text that is shared with an evaluation set.
STAGES = ("normalize", "language", "boilerplate", "quality", "harm", "decontaminate", "pii")
_EXAMPLE = "{law: {stages: [normalize, pii]}}"
_FOR_ALL = ("dedup", "per_source", "own_stages", "allow_own_code")


@dataclass(kw_only=True, slots=True)
class CurationConfig:
    """The stages to run, and the rules of each."""

    stages: list[str] = field(default_factory=lambda: list(STAGES))
    """Stages to run: normalize, language, boilerplate, quality, harm, decontaminate, pii, always in this order."""
    normalize: NormalizeConfig = field(default_factory=NormalizeConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    boilerplate: BoilerplateConfig = field(default_factory=BoilerplateConfig)
    quality: QualityConfig = field(default_factory=QualityConfig)
    harm: HarmConfig = field(default_factory=HarmConfig)
    pii: PiiConfig = field(default_factory=PiiConfig)
    decontaminate: DecontaminateConfig = field(default_factory=DecontaminateConfig)
    dedup: DedupConfig = field(default_factory=DedupConfig)
    """Removal of duplicates, which runs last, over all documents."""
    per_source: Any = None  # dict[str, dict]: Hydra adds no key to a map with that type
    """Options for the documents of one source, under its name, as {law: {stages: [normalize, pii]}, wiki: {quality:
    {mode: annotate}}}. All keys of `curation` may be given but dedup."""
    own_stages: list[PathText] = field(default_factory=list)
    """Your own stages, as PATH.py:CLASS (docs/curation.md). They run after the others, but before pii."""
    allow_own_code: bool = False
    """Run the code of `own_stages`, which may do whatever you may do."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.stages if name not in STAGES]
        if unknown or len(set(self.stages)) != len(self.stages):
            raise ConfigError(
                f"curation.stages={self.stages} must name each stage once; known are {', '.join(STAGES)}"
            )
        if self.own_stages and not self.allow_own_code:
            raise ConfigError(
                f"curation.own_stages={self.own_stages} would run the code in these files; give "
                "curation.allow_own_code=true with it if you trust them"
            )
        if not isinstance(self.per_source, dict | None):
            raise ConfigError(f"curation.per_source={self.per_source} is no map; give one like {_EXAMPLE}")
        for source in self.per_source or {}:
            self.for_source(source)

    def for_source(self, source: str) -> CurationConfig:
        """The options for the documents of a source. Raises ConfigError where those in `per_source` are wrong."""
        changes = (self.per_source or {}).get(source)
        if changes is None:
            return self
        if not isinstance(changes, dict) or not changes.keys().isdisjoint(_FOR_ALL):
            raise ConfigError(
                f"curation.per_source.{source}={changes} must be a map of options without {', '.join(_FOR_ALL)}"
            )
        common = to_dict(replace(self, per_source=None))
        try:
            return validate(CurationConfig, OmegaConf.to_container(OmegaConf.merge(common, changes)))
        except ConfigError as error:
            raise ConfigError(f"curation.per_source.{source}: {error}") from error

    def configs(self) -> list[CurationConfig]:
        """The options for all sources: those that most have, then those of each source in `per_source`."""
        return [self, *(self.for_source(source) for source in self.per_source or {})]


def stage_names(config: CurationConfig) -> list[str]:
    """The names of the stages that any document passes, in their order."""
    used = {name for one in config.configs() for name in one.stages}
    own = [load_stage(stage).name for stage in config.own_stages]
    return [
        *(name for name in STAGES[:-1] if name in used),
        *own,
        *(STAGES[-1:] if STAGES[-1] in used else ()),
    ]


class StagesOf:
    """The stages for the documents of each source, built when its first document comes."""

    def __init__(self, config: CurationConfig, index: Path) -> None:
        self._config, self._index = config, index
        self._built: dict[str, list[CurationStage]] = {}

    def __call__(self, source: str) -> list[CurationStage]:
        name = source if source in (self._config.per_source or {}) else ""
        if name not in self._built:
            self._built[name] = build_stages(self._config.for_source(name), self._index)
        return self._built[name]


def _pii(config: PiiConfig) -> CurationStage:
    from data_tools.stages.pii.stage import PiiStage  # 30 ms for its patterns, which --help does without

    return PiiStage(config)


def build_stages(config: CurationConfig, index: Path) -> list[CurationStage]:
    """The configured stages in their order. `index` is the path of the index of the evaluation sets."""
    builders: dict[str, Callable[[], CurationStage]] = {
        "normalize": lambda: NormalizeStage(config.normalize),
        "language": lambda: LanguageStage(config.language),
        "boilerplate": lambda: BoilerplateStage(config.boilerplate, config.quality.is_curated),
        "quality": lambda: QualityStage(config.quality),
        "harm": lambda: HarmStage(config.harm),
        "decontaminate": lambda: DecontaminateStage(replace(config.decontaminate, index=str(index))),
        "pii": lambda: _pii(config.pii),
    }
    built = {name: builders[name]() for name in STAGES if name in config.stages}
    last = [built.pop("pii")] if "pii" in built else []
    return [*built.values(), *map(load_stage, config.own_stages), *last]
