"""Downloads what a job needs from its hubs with ms-swift's own functions, before a card is given to the job.

    python -c "$(cat download.py)" '{"model": "org/name", "model_revision": null, "datasets": ["org/data#500"], "use_hf": null}'

Every key may be missing. The files go where the trainer will look for them: the same functions choose the place. No
card is touched. Works with ms-swift 3.12 and 4.x.
"""

import json
import sys


def main(wanted):
    try:
        from swift.dataset import load_dataset
        from swift.utils import safe_snapshot_download
    except ImportError:
        from swift.llm import load_dataset, safe_snapshot_download
    use_hf = wanted.get("use_hf")
    if wanted.get("model"):
        safe_snapshot_download(wanted["model"], revision=wanted.get("model_revision"), use_hf=use_hf)
    for dataset in wanted.get("datasets", []):
        load_dataset([dataset], use_hf=use_hf)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
