"""datatrove's near duplicates as FineWeb made them, run in datatrove's environment: python peer_near.py LANGUAGE
FILE FOLDER"""

import sys
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.hashing import HashConfig
from datatrove.utils.typeshelper import Languages


def main(language: str, file: str, folder: str) -> None:
    # `Languages.chinese` gets a tokenizer that splits at spaces (data/tokenizer_assignment.csv: "FALSE" is true); this
    # one is right.
    splitter = Languages.english if language == "en" else Languages.mandarin_chinese
    config = MinhashConfig(hash_config=HashConfig(precision=64), num_buckets=14, hashes_per_bucket=8, n_grams=5)
    path = Path(file)
    read = JsonlReader(str(path.parent), glob_pattern=path.name, id_key="id", text_key="text")
    steps = [
        (1, [read, MinhashDedupSignature(output_folder=f"{folder}/signatures", config=config, language=splitter)]),
        (
            14,
            [
                MinhashDedupBuckets(
                    input_folder=f"{folder}/signatures", output_folder=f"{folder}/buckets", config=config
                )
            ],
        ),
        (1, [MinhashDedupCluster(input_folder=f"{folder}/buckets", output_folder=f"{folder}/remove", config=config)]),
        (1, [read, MinhashDedupFilter(input_folder=f"{folder}/remove"), JsonlWriter(f"{folder}/out")]),
    ]
    for number, (tasks, pipeline) in enumerate(steps):
        LocalPipelineExecutor(pipeline=pipeline, tasks=tasks, workers=1, logging_dir=f"{folder}/logs/{number}").run()


if __name__ == "__main__":
    main(*sys.argv[1:])
