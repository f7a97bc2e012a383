"""The settings of a corpus. Nothing heavy is imported until they are used: the command line shows them."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args, get_type_hints

from mm_gpt.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from mm_gpt.datasets.building.pipeline import Filter
    from mm_gpt.datasets.duplicates.minhash import MinHash
    from mm_gpt.datasets.filters.published_filters import Filters
    from mm_gpt.datasets.web.extract import ExtractConfig


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """How a corpus is made. Records and conversations go whole or stay as they are: those with an image that is missing
    or broken, those that share anything with an evaluation set, and doubles go."""

    filters: Literal["none", "basic", "kosmos", "obelics"] = "basic"
    """What goes. `basic`: paragraphs of repetitions and symbols, documents without any sentence, and icons. `kosmos`,
    `obelics`: by the rules of those corpora."""
    languages: tuple[str, ...] = ()
    """Keep documents in these languages, by codes such as `en,de,yue` (ISO 639-1, or 639-3 where that has none); none:
    all, or English for `kosmos` and `obelics`."""
    undetermined: Literal["drop", "keep"] = "drop"
    """Documents that do not tell their language ("OK!", images alone), where `languages` are chosen."""
    alt: Literal["drop", "text"] = "drop"
    """What pages say in place of an image. `text`: it stands behind the image."""
    captions: Literal["keep", "drop"] = "keep"
    """Captions of figures on pages."""
    opt_out: bool = True
    """Leave out pages and images whose owners say so: robots and TDM reservation signals."""
    personal_data: bool = True
    """Replace addresses, phone numbers, account numbers and the like by marks."""
    quality: str | None = None
    """Folder of a quality classifier, as `mm-gpt corpus quality` writes it: better documents stay more often."""
    fetch: bool = True
    """Fetch images behind URLs, from public addresses only; false: they are left out."""
    image_side: int | None = 1024
    """Longest side in pixels: larger images are made smaller. none: files stay as they are."""
    max_images: int | None = None
    """Images of a document; the first ones stay. none: all."""
    near_duplicates: float | None = 0.8
    """Documents whose words agree by more than this are one (0 to 1, by MinHash). none: only equal ones are."""
    keep: Literal["first", "longest"] = "first"
    """Which one of duplicates stays."""
    image_documents: int | None = 10
    """Images that are in more documents are decoration, and go from documents. none: they stay."""
    contamination: str | None = None
    """Folder that `mm-gpt corpus contamination` wrote: what is in its evaluation sets is cut out."""
    shard_mb: int = 256
    """Size of a shard in MiB."""
    seed: int = 0
    """Of what is left to chance: documents that `quality` keeps, and `kosmos`'s half of those with one image."""

    def __post_init__(self) -> None:
        if self.near_duplicates is not None and not 0 < self.near_duplicates <= 1:
            raise ConfigError(f"near_duplicates must be above 0 and at most 1, not {self.near_duplicates}")
        for name in ("filters", "undetermined", "alt", "captions", "keep"):
            options = get_args(get_type_hints(CorpusConfig)[name])
            if getattr(self, name) not in options:
                raise ConfigError(unknown_name(name, str(getattr(self, name)), options))
        for name in ("image_side", "max_images", "image_documents", "shard_mb"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}")

    def extraction(self) -> "ExtractConfig":
        from mm_gpt.datasets.web.extract import ExtractConfig

        config = ExtractConfig(alt=self.alt, captions=self.captions)
        return config if self.opt_out else dataclasses.replace(config, page_opt_outs=(), image_opt_outs=())

    def stages(self) -> "Filters":
        """What runs before and behind the fetching of images."""
        from mm_gpt.datasets.contamination.decontaminate import RemoveContamination
        from mm_gpt.datasets.filters.document_filters import ImageLimit
        from mm_gpt.datasets.filters.language_id import Language
        from mm_gpt.datasets.filters.personal_data import PersonalData
        from mm_gpt.datasets.filters.published_filters import Filters, basic, kosmos, obelics
        from mm_gpt.datasets.filters.quality import QualityFilter

        match self.filters:
            case "none":
                language = Language(languages=self.languages, undetermined=self.undetermined)
                filters = Filters((language,) if self.languages else (), ())
            case "basic":
                filters = basic(languages=self.languages, undetermined=self.undetermined)
            case "kosmos":
                languages = self.languages or ("en",)
                filters = kosmos(languages=languages, undetermined=self.undetermined, seed=self.seed)
            case "obelics":
                filters = obelics(languages=self.languages or ("en",), undetermined=self.undetermined)
        before, after = list(filters.before_fetch), list(filters.after_fetch)
        if self.quality is not None:
            before.append(QualityFilter(path=self.quality, seed=self.seed))
        if self.personal_data:
            before.append(PersonalData())
        if self.max_images is not None:
            after.append(ImageLimit(maximum=self.max_images))
        if self.contamination is not None:
            after.append(RemoveContamination(index_path=self.contamination))
        # A rule that is checked again is another step of the funnel.
        names = {stage.name for stage in before}
        again = {name for name in (stage.name for stage in after) if name in names}
        after = [_renamed(stage, f"{stage.name}, fetched") if stage.name in again else stage for stage in after]
        return Filters(tuple(before), tuple(after))

    def steps(self) -> list[str]:
        """The lines of the funnel, in order."""
        stages = self.stages()
        before, after = ([stage.name for stage in some] for some in (stages.before_fetch, stages.after_fetch))
        return ["read", *before, "fetch images", *after, "store", "duplicates", "repeated images", "written"]

    def minhash(self) -> "MinHash":
        from mm_gpt.datasets.duplicates.minhash import MinHash

        return MinHash() if self.near_duplicates is None else MinHash(threshold=self.near_duplicates)


def _renamed(stage: Any, name: str) -> "Filter":
    renamed: Filter = dataclasses.replace(stage, name=name)
    return renamed
