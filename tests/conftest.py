import os

# Before transformers is imported: no test may reach a hub, and models are small enough for one thread each.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
