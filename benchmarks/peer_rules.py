"""FineWeb's filters as FineWeb ran them, in datatrove's environment: python peer_rules.py FILE FOLDER"""

import sys
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter


def main(file: str, folder: str) -> None:
    path = Path(file)
    pipeline = [
        JsonlReader(str(path.parent), glob_pattern=path.name, id_key="id", text_key="text"),
        GopherRepetitionFilter(),
        GopherQualityFilter(),
        C4QualityFilter(filter_no_terminal_punct=False),
        FineWebQualityFilter(),
        JsonlWriter(f"{folder}/out"),
    ]
    LocalPipelineExecutor(pipeline=pipeline, tasks=1, workers=1, logging_dir=f"{folder}/logs").run()


if __name__ == "__main__":
    main(*sys.argv[1:])
