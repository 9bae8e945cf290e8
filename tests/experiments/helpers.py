"""Results as a run keeps them."""

import json

from records import file_of, save


def keep(job, record, results):
    save(record, job.key, job.task, results)


def remove(job, results):
    lines = file_of(job.task, results).read_text().splitlines(keepends=True)
    left = [line for line in lines if json.loads(line)["run"] != job.key]
    assert len(left) == len(lines) - 1
    file_of(job.task, results).write_text("".join(left))
