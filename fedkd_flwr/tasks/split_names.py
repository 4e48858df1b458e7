"""Which files of a folder are which split, where capitals or an ending keep `datasets` from seeing it.

The library goes by names in small letters: a folder or file called train (or training), test (testing, eval,
evaluation) or validation (valid, val, dev). Here "Train", "TEST" and "trainset" are the same.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

ALLOWED = "train (training), test (testing, eval, evaluation) or validation (valid, val, dev)"

_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_APART = r"[-._ 0-9]"  # what may stand beside a keyword
_ENDINGS = r"(?:[-_ ]?(?:set|data))?"


def files_by_split(folder: str) -> dict[str, list[str]] | None:
    """Patterns of each split's files, for `datasets`; None where the library sees the same without them.

    Args:
        folder: of a data set.
    """
    if _says_itself(Path(folder)):
        return None
    paths = list(_paths(folder))
    found = _sorted(paths, _ENDINGS, re.IGNORECASE)
    if not found or found == _sorted(paths, "", re.NOFLAG):
        return None
    return {split: list(dict.fromkeys(map(_escaped, places.values()))) for split, places in found.items()}


def _says_itself(folder: Path) -> bool:
    """Whether a data card or the names of shards say which files are which split."""
    card = folder / "README.md"
    named = card.is_file() and "data_files" in card.read_text(encoding="utf-8", errors="replace")
    return named or (folder / ".huggingface.yaml").exists() or any((folder / "data").glob("*-?????-of-?????*.*"))


def _paths(folder: str) -> Iterator[str]:
    """Files below a folder by their paths in it, hidden ones left out, as the library does."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        inside = os.path.relpath(place, folder)
        for name in sorted(files):
            if not name.startswith("."):
                yield name if inside == "." else f"{inside}/{name}"


def _sorted(paths: list[str], endings: str, flags: re.RegexFlag) -> dict[str, dict[str, str]]:
    """For each split its files, each with the folder or the file that is called so. Folders' names come first."""
    for of_folders in (True, False):
        found: dict[str, dict[str, str]] = {}
        for split, words in _KEYWORDS.items():
            end = f"(?:{_APART}.*)?" if of_folders else f"{_APART}.*"
            rule = re.compile(f"(?:.*{_APART})?(?:{'|'.join(words)}){endings}{end}", flags)
            mine = {path: place for path in paths if (place := _called(path, rule, of_folders=of_folders))}
            if mine:
                found[split] = mine
        if found:
            return found
    return {}


def _called(path: str, rule: re.Pattern[str], *, of_folders: bool) -> str | None:
    """The outermost folder on a path that a rule names, as a pattern of its files; or the path itself."""
    *folders, name = path.split("/")
    if not of_folders:
        return path if rule.fullmatch(name) else None
    for depth, folder in enumerate(folders, 1):
        if rule.fullmatch(folder):
            return "/".join([*folders[:depth], "**"])
    return None


def _escaped(pattern: str) -> str:
    """A path as a pattern: what would stand for other characters stands for itself."""
    inside = pattern.removesuffix("/**")
    return re.sub(r"([\[*?])", r"[\1]", inside) + pattern[len(inside) :]


def found_in(folder: str, most: int = 5) -> str:
    """The first few names in a folder, for an error."""
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
