"""Text to shards of ids by datatrove, on the processors of this machine; SLURM and Ray are in docs/tokens.md.

    python -m experiments.handoff.shards 'corpus/*.jsonl.gz' --tokenizer RUN --output shards --workers 2

Started again, it makes what is missing, and nothing else.
"""

import argparse
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor

from gptlab.data.datatrove import TextFiles, TokenShards
from gptlab.data.formats import READINGS, Reading


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="paths or globs, as for data.files")
    parser.add_argument("--tokenizer", required=True, help="a run, or a tokenizer folder or file")
    parser.add_argument("--output", required=True, help="the folder for the shards; logs/ in it has those of datatrove")
    parser.add_argument("--tasks", type=int, help="how many shards; default: one for each file")
    parser.add_argument("--workers", type=int, default=2, help="tasks at a time, each a process")
    parser.add_argument("--documents", default="auto", choices=READINGS, help="as data.documents")
    parser.add_argument("--separator", help="as data.separator")
    parser.add_argument("--field", default="text", help="as data.field")
    arguments = parser.parse_args()
    try:
        reader = TextFiles(arguments.files, Reading(arguments.documents, arguments.separator, arguments.field))
        shards = TokenShards(arguments.output, arguments.tokenizer)
        tasks = arguments.tasks or len(reader.paths)
        logs = Path(arguments.output, "logs").absolute()
        shards.forget_lost(logs, tasks, reader)
        LocalPipelineExecutor([reader, shards], tasks, arguments.workers, logging_dir=str(logs)).run()
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
