"""The part of the ledger that follows every record from raw to published: by source, language and reason, with
duplicates beside what was kept for them, and bad input with its places.

Like rule_report.py it is computed from the stored outcomes of all units: complete after any number of
interruptions, and the same for any number of workers.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.data.cleaning import unit_files
from pipeline.data.cleaning.rule_report import KINDS, SAMPLES, candidates, smallest
from pipeline.data.dedup.external_sort import blocks

if TYPE_CHECKING:
    from pipeline.data.dedup.document_index import Index

SIZES = (1, 2, 3, 5, 10, 100, 1000)  # clusters are counted by size: the last that is not larger
ALIKE = (0.0, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)


class Funnel:
    """Sums over outcomes; `add` takes units in order within a source."""

    def __init__(self, index: "Index", units: dict[str, list[Path]]):
        self.index, self.units = index, units
        self.cells: dict[tuple[str, str, str, str], list[int]] = {}
        self.first: dict[str, dict[str, list[dict]]] = {}
        self.samples: dict[str, list[tuple]] = {}
        self.alike = np.zeros(len(ALIKE), np.int64)

    def add(self, source: str, outcome, status: np.ndarray, reason: np.ndarray, document: np.ndarray) -> None:
        """Rows of a unit: pyarrow.Table with place, id, excerpt, bytes, language and kind; the fate of each (kept
        counts as status `kept` with its split as the reason); and its number in the index where it has one."""
        kept, copy = status == "kept", status == "duplicates"
        published = np.zeros(len(status), np.int64)
        published[kept] = self.index.size[document[kept]]
        keys = zip(self._languages(outcome), status.tolist(), reason.tolist(), strict=True)
        for key, size, out in zip(keys, outcome["bytes"].to_pylist(), published.tolist(), strict=True):
            cell = self.cells.setdefault((source, *key), [0, 0, 0])
            cell[0], cell[1], cell[2] = cell[0] + 1, cell[1] + size, cell[2] + out
        for why in np.unique(reason[status == "bad"]).tolist():
            found = self.first.setdefault(source, {}).setdefault(why, [])
            rows = np.flatnonzero((status == "bad") & (reason == why))[: SAMPLES - len(found)]
            found += outcome.select(["place", "excerpt"]).take(rows).to_pylist()
        near = document[copy & (reason == "near")]
        if len(near):
            np.add.at(self.alike, np.searchsorted(ALIKE, self._alike(near), "right") - 1, 1)
        self._sample(source, outcome, reason, copy, document)

    @staticmethod
    def _languages(outcome) -> list[str]:
        """What language identification said, or which thresholds judged the document where it was not asked; empty
        for what could not be read."""
        pairs = zip(outcome["language"].to_pylist(), outcome["kind"].to_pylist(), strict=True)
        return [code or ("" if kind is None else KINDS[kind]) for code, kind in pairs]

    def _alike(self, documents: np.ndarray) -> np.ndarray:
        """Share of their signature that documents have in common with what was kept for them: an estimate of their
        Jaccard similarity."""
        originals = self.index.original[documents]
        return np.array(
            [
                (self.index.signature[a] == self.index.signature[b]).mean()
                for a, b in zip(documents.tolist(), originals.tolist(), strict=True)
            ]
        )

    def _sample(self, source: str, outcome, reason: np.ndarray, copy: np.ndarray, document: np.ndarray) -> None:
        """Of each kind of duplicate those with the smallest record ids, as in rejections.py."""
        rows = np.flatnonzero(copy)
        if not len(rows):
            return
        ids = np.array(outcome["id"].take(rows).to_pylist())
        for why in np.unique(reason[rows]).tolist():
            mine = candidates(ids, np.flatnonzero(reason[rows] == why))
            entries = outcome.select(["place", "excerpt"]).take(rows[mine]).to_pylist()
            found = [
                (str(ids[i]), source, entry["place"], entry["excerpt"], int(document[rows[i]]))
                for i, entry in zip(mine.tolist(), entries, strict=True)
            ]
            self.samples[why] = smallest(self.samples.get(why, []), found)

    def report(self) -> dict[str, Any]:
        """JSON. `steps`: source -> language -> status -> reason -> [documents, bytes of their text as it was read,
        bytes of text published]; `bad`: source -> reason -> first places; `duplicates`: samples beside what was
        kept, `clusters` by size, the largest of them, and how alike near duplicates are to what was kept: [share of
        the signature, how many]."""
        steps: dict[str, Any] = {}
        for (source, language, status, reason), cell in sorted(self.cells.items()):
            steps.setdefault(source, {}).setdefault(language, {}).setdefault(status, {})[reason] = cell
        sizes, largest = self._clusters()
        originals = {
            sample[4]: int(self.index.original[sample[4]]) for samples in self.samples.values() for sample in samples
        }
        known = self._found([*originals.values(), *largest])
        samples = {}
        for why, listed in sorted(self.samples.items()):
            samples[why] = []
            for id, source, place, excerpt, document in listed:
                entry = {"id": id, "source": source, "place": place, "excerpt": excerpt}
                if originals[document] != document:
                    entry["of"] = known[originals[document]]
                    if why == "near":
                        entry["alike"] = round(float(self._alike(np.array([document]))[0]), 4)
                samples[why].append(entry)
        return {
            "steps": steps,
            "bad": self.first,
            "duplicates": {
                "samples": samples,
                "clusters": sizes,
                "largest": [
                    {"documents": int(self.index.cluster[document]), **known[document]} for document in largest
                ],
                "alike": [[low, int(number)] for low, number in zip(ALIKE, self.alike, strict=True)],
            },
        }

    def _clusters(self) -> tuple[list[list[int]], list[int]]:
        """[[least size, clusters, documents in them], ...] of what was kept, and the documents kept for the largest
        clusters."""
        index, counts, members, largest = self.index, np.zeros(len(SIZES), np.int64), np.zeros(len(SIZES), np.int64), []
        for part in blocks(len(index.row)):
            documents = part.start + np.flatnonzero(index.original[part] == np.arange(part.start, part.stop))
            size = np.asarray(index.cluster[documents]).astype(np.int64)
            place = np.searchsorted(SIZES, size, "right") - 1
            counts += np.bincount(place, minlength=len(SIZES))
            members += np.bincount(place, size, minlength=len(SIZES)).astype(np.int64)
            several = np.flatnonzero(size > 1)
            several = several[np.argsort(-size[several], kind="stable")][:SAMPLES]
            largest += [(-int(size[i]), *index.id[documents[i]].tolist(), int(documents[i])) for i in several.tolist()]
        listed = [
            [least, int(number), int(total)]
            for least, number, total in zip(SIZES, counts, members, strict=True)
            if number
        ]
        return listed, [entry[-1] for entry in sorted(largest)[:SAMPLES]]

    def _found(self, documents: list[int]) -> dict[int, dict]:
        """Id, source, place and beginning of documents; those of an earlier output have an id alone."""
        index, found = self.index, {}
        for document in dict.fromkeys(documents):
            found[document] = {"id": "{:016x}{:016x}".format(*index.id[document].tolist())}
            if index.source[document] < 0:
                found[document]["source"] = "an earlier output"
                continue
            name = index.sources[int(index.source[document])]
            unit = int(index.unit[document])
            table = unit_files.read(self.units[name][unit], ["place", "excerpt"]).slice(int(index.row[document]), 1)
            found[document] |= {"source": name, **unit_files.at_lines(table, index.lines[name][unit]).to_pylist()[0]}
        return found
