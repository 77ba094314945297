"""Prints how many rows and packs ms-swift makes of a data set: packs.py MODEL DATA MAX_LENGTH, without training."""

import json
import sys

model, data, max_length = sys.argv[1], sys.argv[2], int(sys.argv[3])
try:
    from swift.dataset import AddLengthPreprocessor, LazyLLMDataset, PackingDataset, load_dataset
    from swift.model import get_processor
    from swift.template import get_template

    template = get_template(get_processor(model), max_length=max_length)
except ImportError:  # ms-swift 3.x
    from swift.llm import get_model_tokenizer, get_template, load_dataset
    from swift.llm.dataset import LazyLLMDataset, PackingDataset
    from swift.llm.dataset.utils import AddLengthPreprocessor

    # The line finds it by the model type qwen2.
    tokenizer = get_model_tokenizer(model, load_model=False)[1]
    template = get_template("qwen", tokenizer, max_length=max_length)
template.set_mode("train")
rows, _ = load_dataset([data], shuffle=True)
rows = AddLengthPreprocessor(template=template)(rows, load_from_cache_file=False)
packs = PackingDataset(template, LazyLLMDataset(rows, template.encode), packing_length=max_length)
print(json.dumps({"rows": len(rows), "packs": len(packs)}))
