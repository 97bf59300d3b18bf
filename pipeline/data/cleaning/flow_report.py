"""The part of report.json that follows every record from raw to published: by source, language and reason, with
duplicates next to what was kept for them, and bad input with its places.

Like rule_report.py it is computed from the stored outcomes of all units: complete after any number of interruptions,
and the same for any number of workers.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.data.cleaning import unit_files
from pipeline.data.cleaning.language import GROUPS
from pipeline.data.cleaning.samples import SAMPLES, candidate_rows, merge_samples
from pipeline.data.dedup.external_sort import blocks

if TYPE_CHECKING:
    from pipeline.data.dedup.document_index import Index

SIZES = (1, 2, 3, 5, 10, 100, 1000)  # clusters are counted by the last of these that is not larger
SIMILARITIES = (0.0, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)  # near duplicates likewise


class FlowReport:
    """Sums over outcomes; `add` takes the units of a source in order."""

    def __init__(self, index: "Index", units: dict[str, list[Path]]):
        self.index, self.units = index, units
        # (source, language, status, reason) -> documents, bytes as read, bytes published
        self.cells: dict[tuple[str, str, str, str], list[int]] = {}
        self.bad: dict[str, dict[str, list[dict]]] = {}  # source -> reason -> the first places
        self.samples: dict[str, list[tuple]] = {}  # kind of duplicate -> (id, source, place, excerpt, document)
        self.similarities = np.zeros(len(SIMILARITIES), np.int64)

    def add(self, source: str, outcomes, status: np.ndarray, reason: np.ndarray, document: np.ndarray) -> None:
        """Rows of a unit: pyarrow.Table with place, id, excerpt, bytes, language and kind; the final status and reason
        of each (`kept` has its split as the reason), and its number in the index if it has one."""
        published = np.zeros(len(status), np.int64)
        is_kept = status == "kept"
        published[is_kept] = self.index.size[document[is_kept]]
        keys = zip(_languages(outcomes), status.tolist(), reason.tolist(), strict=True)
        for key, read, written in zip(keys, outcomes["bytes"].to_pylist(), published.tolist(), strict=True):
            cell = self.cells.setdefault((source, *key), [0, 0, 0])
            cell[0] += 1
            cell[1] += read
            cell[2] += written
        self._add_bad(source, outcomes, status, reason)
        is_duplicate = status == "duplicates"
        near = document[is_duplicate & (reason == "near")]
        if len(near):
            bins = np.searchsorted(SIMILARITIES, self._similarity(near), "right") - 1
            np.add.at(self.similarities, bins, 1)
        self._add_samples(source, outcomes, reason, is_duplicate, document)

    def _add_bad(self, source: str, outcomes, status: np.ndarray, reason: np.ndarray) -> None:
        is_bad = status == "bad"
        for name in np.unique(reason[is_bad]).tolist():
            places = self.bad.setdefault(source, {}).setdefault(name, [])
            rows = np.flatnonzero(is_bad & (reason == name))[: SAMPLES - len(places)]
            places += outcomes.select(["place", "excerpt"]).take(rows).to_pylist()

    def _add_samples(
        self, source: str, outcomes, reason: np.ndarray, is_duplicate: np.ndarray, document: np.ndarray
    ) -> None:
        rows = np.flatnonzero(is_duplicate)
        if not len(rows):
            return
        ids = np.array(outcomes["id"].take(rows).to_pylist())
        columns = outcomes.select(["place", "excerpt"]).take(rows)
        for name in np.unique(reason[rows]).tolist():
            chosen = candidate_rows(ids, np.flatnonzero(reason[rows] == name))
            samples = []
            for row, entry in zip(chosen.tolist(), columns.take(chosen).to_pylist(), strict=True):
                samples.append((str(ids[row]), source, entry["place"], entry["excerpt"], int(document[rows[row]])))
            self.samples[name] = merge_samples(self.samples.get(name, []), samples)

    def _similarity(self, documents: np.ndarray) -> np.ndarray:
        """Share of their signature that documents have in common with what was kept for them: an estimate of their
        Jaccard similarity, float [N]."""
        signature, originals = self.index.signature, self.index.original[documents]
        pairs = zip(documents.tolist(), originals.tolist(), strict=True)
        return np.array([(signature[document] == signature[original]).mean() for document, original in pairs])

    # ---- report.json -------------------------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """JSON. `steps`: source -> language -> status -> reason -> [documents, bytes of their text as it was read,
        bytes of text published]; `bad`: source -> reason -> first places; `duplicates`: samples next to what was kept,
        `clusters` by size, the largest of them, and how similar near duplicates are to what was kept: [share of the
        signature, how many]."""
        steps: dict[str, Any] = {}
        for (source, language, status, reason), cell in sorted(self.cells.items()):
            steps.setdefault(source, {}).setdefault(language, {}).setdefault(status, {})[reason] = cell
        return {"steps": steps, "bad": self.bad, "duplicates": self._duplicates()}

    def _duplicates(self) -> dict[str, Any]:
        clusters, largest = self._clusters()
        originals = []
        for samples in self.samples.values():
            originals += [int(self.index.original[document]) for *_, document in samples]
        described = self._describe([*originals, *largest])
        samples_by_kind = {}
        for name, samples in sorted(self.samples.items()):
            samples_by_kind[name] = [self._sample(name, sample, described) for sample in samples]
        largest_clusters = []
        for document in largest:
            largest_clusters.append({"documents": int(self.index.cluster[document])} | described[document])
        return {
            "samples": samples_by_kind,
            "clusters": clusters,
            "largest": largest_clusters,
            "alike": [list(pair) for pair in zip(SIMILARITIES, self.similarities.tolist(), strict=True)],
        }

    def _sample(self, name: str, sample: tuple, described: dict[int, dict]) -> dict:
        id, source, place, excerpt, document = sample
        entry = {"id": id, "source": source, "place": place, "excerpt": excerpt}
        original = int(self.index.original[document])
        if original != document:
            entry["of"] = described[original]
            if name == "near":
                entry["alike"] = round(float(self._similarity(np.array([document]))[0]), 4)
        return entry

    def _clusters(self) -> tuple[list[list[int]], list[int]]:
        """[[least size, clusters, documents in them], ...] of what was kept, and the documents kept for the largest
        clusters."""
        index = self.index
        clusters, members = np.zeros(len(SIZES), np.int64), np.zeros(len(SIZES), np.int64)
        largest: list[tuple] = []  # (negative size, id, document)
        for part in blocks(len(index.row)):
            is_original = index.original[part] == np.arange(part.start, part.stop)
            documents = part.start + np.flatnonzero(is_original)
            size = np.asarray(index.cluster[documents]).astype(np.int64)
            bins = np.searchsorted(SIZES, size, "right") - 1
            clusters += np.bincount(bins, minlength=len(SIZES))
            members += np.bincount(bins, size, minlength=len(SIZES)).astype(np.int64)
            several = np.flatnonzero(size > 1)
            several = several[np.argsort(-size[several], kind="stable")][:SAMPLES]
            for row in several.tolist():
                largest.append((-int(size[row]), *index.id[documents[row]].tolist(), int(documents[row])))
        counted = [
            list(bin_counts)
            for bin_counts in zip(SIZES, clusters.tolist(), members.tolist(), strict=True)
            if bin_counts[1]
        ]
        return counted, [entry[-1] for entry in sorted(largest)[:SAMPLES]]

    def _describe(self, documents: list[int]) -> dict[int, dict]:
        """Id, source, place and beginning of documents; of those of an earlier output only the id is known."""
        index, described = self.index, {}
        for document in dict.fromkeys(documents):
            entry = {"id": index.id_text(document)}
            described[document] = entry
            if index.source[document] < 0:
                entry["source"] = "an earlier output"
                continue
            entry["source"] = name = index.sources[int(index.source[document])]
            unit = int(index.unit[document])
            table = unit_files.read(self.units[name][unit], ["place", "excerpt"]).slice(int(index.row[document]), 1)
            entry.update(unit_files.with_file_lines(table, index.lines[name][unit]).to_pylist()[0])
        return described


def _languages(outcomes) -> list[str]:
    """The detected language, or the group whose thresholds applied where none was detected; empty for records that
    could not be read."""
    languages = []
    for code, kind in zip(outcomes["language"].to_pylist(), outcomes["kind"].to_pylist(), strict=True):
        if not code:
            code = "" if kind is None else GROUPS[kind]
        languages.append(code)
    return languages
