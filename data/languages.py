"""Languages as classes: which class a corpus' code of a language is."""

from collections.abc import Iterable, Sequence

from data.templates import primary


class LanguageLabels:
    """Classes 0 .. n - 1, in the order of `names`; one with several codes has them joined by "|".

    A code is known as it is written, or without its region: "en" is also "en_us", and "cmn|zh"
    is FLEURS' "cmn_hans_cn" and Common Voice's "zh-CN".
    """

    def __init__(self, names: Sequence[str]):
        """Raises `ValueError` where a code comes twice."""
        self._of: dict[str, int] = {}
        for label, name in enumerate(names):
            for code in name.split("|"):
                if code in self._of:
                    raise ValueError(f"language {code!r} is in {names[self._of[code]]!r} already")
                self._of[code] = label

    def __call__(self, language: str) -> int:
        """The class of a code; -1 where there is none."""
        return self._of.get(language, self._of.get(primary(language), -1))

    def unknown(self, languages: Iterable[str]) -> list[str]:
        """Those of `languages` that have no class."""
        return sorted({code for code in languages if self(code) < 0})
