"""What there is to say of findings, whoever says it: groups, the worst files, words. Next to read: `report.py`."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ml_src.core.checking.kinds import KINDS, SEVERITIES, Finding


@dataclass(frozen=True)
class Group:
    """All findings of one kind and severity."""

    kind: str
    severity: str
    findings: list[Finding]

    @property
    def title(self) -> str:
        """The kind in plain words."""
        return self.kind.replace("_", " ")

    @property
    def details(self) -> list[str]:
        """What belongs below: each line once, such as those of a proposed table of colours."""
        return list(dict.fromkeys(line for finding in self.findings for line in finding.details))

    @property
    def num_files(self) -> int:
        """How many files it concerns; 0 where it is about the data set as a whole."""
        return len({finding.path for finding in self.findings if finding.path is not None})

    @property
    def remedy(self) -> str:
        """What to do; where each file needs something else, one example."""
        remedies = list(dict.fromkeys(remedy_of(finding) for finding in self.findings))
        return f"for each file its own, such as: {remedies[0]}" if len(remedies) > 1 else remedies[0]


def remedy_of(finding: Finding) -> str:
    """What to do about one finding: its fix, or else what its sentence ends with."""
    return finding.fix or finding.message.rpartition(": ")[2]


def groups_of(findings: Iterable[Finding]) -> list[Group]:
    """Return the findings by kind: in the order of `findings.find`, errors first."""
    by_kind: dict[tuple[str, str], list[Finding]] = defaultdict(list)
    for finding in findings:
        by_kind[finding.kind, finding.severity].append(finding)
    groups = [Group(kind, severity, found) for (kind, severity), found in by_kind.items()]
    return sorted(
        groups, key=lambda group: (SEVERITIES.index(group.severity), -group.num_files, KINDS.index(group.kind))
    )


def worst_files(findings: Iterable[Finding]) -> list[tuple[Path, list[Finding]]]:
    """Return each file with its findings, the worst first; the file with most errors, then warnings, stands first."""
    by_path: dict[Path, list[Finding]] = defaultdict(list)
    for finding in findings:
        if finding.path is not None:
            by_path[finding.path].append(finding)
    for found in by_path.values():
        found.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    return sorted(by_path.items(), key=lambda item: ([-number for number in by_severity(item[1])], str(item[0])))


def by_severity(findings: Iterable[Finding]) -> list[int]:
    """How many errors, warnings and notes there are."""
    counts = Counter(finding.severity for finding in findings)
    return [counts[severity] for severity in SEVERITIES]


def counted(findings: Iterable[Finding]) -> str:
    """Say how many: "2 errors, 1 note"."""
    numbers = zip(SEVERITIES, by_severity(findings), strict=True)
    return ", ".join(plural(number, word) for word, number in numbers if number) or "nothing found"


def plural(number: int, word: str) -> str:
    """Return a number with its word: "1 file", "2 files"."""
    return f"{number} {word}{'s' * (number != 1)}"


def printable(text: object) -> str:
    """Spell out what has no glyph: names of files may hold control characters, and bytes that are no text."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in str(text))


def relative(path: Path, data_dir: Path) -> str:
    """Return a path as seen from the data folder, with slashes."""
    return Path(os.path.relpath(path, data_dir)).as_posix()


def plain_number(value: float) -> str:
    """Return a mask value without needless digits."""
    return str(int(value)) if value == int(value) else str(float(value))
