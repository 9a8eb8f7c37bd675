"""Writes small random weights where RadEval looks for those of its metrics, and in their form. Run as a script.

The environment names the folders: `XDG_CACHE_HOME` (RadGraph's and CheXbert's), `HF_HOME` and `NLTK_DATA`. What is
computed with them says nothing of a report; it shows that what RadEval computes arrives.
"""

import json
import os
import sys
from pathlib import Path

import radeval
import torch
from dotmap import DotMap
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    BertTokenizerFast,
    DistilBertConfig,
    DistilBertModel,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

sys.modules.setdefault("RadEval", radeval)
from RadEval.metrics.radgraph._vendor import core  # noqa: E402

CACHE, HUB, NLTK = (Path(os.environ["XDG_CACHE_HOME"]), Path(os.environ["HF_HOME"]) / "hub", os.environ["NLTK_DATA"])
WORDS = "the heart is large clear lungs no effusion edema seen . left small right pleural pneumothorax normal 1 2"
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS.split()]
SIZES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": len(VOCABULARY)}


def config(layers=1, **options):
    return BertConfig(num_hidden_layers=layers, initializer_range=0.5, **SIZES, **options)


def snapshot(repository, cache=HUB):
    """The folder in which a repository of the Hub is kept."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    return folder / "snapshots" / ("0" * 40)


def save(folder, model=None):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=512).save_pretrained(folder)
    (model or config()).save_pretrained(folder)


def write_radgraph(name):
    folder = Path(core.CACHE_DIR) / name
    (folder / "vocabulary").mkdir(parents=True)
    (folder / "vocabulary" / "non_padded_namespaces.txt").write_text("*labels\n")
    entities = ["", "Anatomy::definitely present", "Observation::definitely present", "Observation::definitely absent"]
    for kind, labels in (("ner", entities), ("relation", ["", "modify", "located_at", "suggestive_of"])):
        (folder / "vocabulary" / f"{name}__{kind}_labels.txt").write_text("\n".join(labels) + "\n")
    bert = {"model_name": str(folder / "bert"), "max_length": 512}
    save(folder / "bert")
    sizes = {
        "feature_size": 4,
        "max_span_width": 3,
        "target_task": "relation",
        "feedforward_params": {"num_layers": 1, "hidden_dims": 8, "dropout": 0.0},
        "loss_weights": {"ner": 1, "relation": 1, "coref": 0, "events": 0},
        "modules": {
            "ner": {},
            "relation": {"spans_per_word": 0.5},
            "coref": {"spans_per_word": 0.3, "max_antecedents": 2},
            "events": {"trigger_spans_per_word": 0.3, "argument_spans_per_word": 0.3, "loss_weights": {}},
        },
    }
    model = {"type": "dygie", "initializer": {}, "module_initializer": {}, **sizes}
    model["embedder"] = {"token_embedders": {"bert": bert}}
    reader = {"max_span_width": 3, "token_indexers": {"bert": bert}}
    (folder / "config.json").write_text(json.dumps({"dataset_reader": reader, "model": model}))
    embedder = core.text_field_embedders.BasicTextFieldEmbedder(
        {"bert": core.token_embedders.PretrainedTransformerMismatchedEmbedder(**bert)}
    )
    vocabulary = core.Vocabulary.from_files(str(folder / "vocabulary"), None, None)
    weights = core.dygie.DyGIE(vocab=vocabulary, embedder=embedder, **DotMap(sizes)).state_dict()
    for key, values in weights.items():
        if key.startswith("_ner.") and key.endswith("bias"):
            values += 1  # so that some spans are entities
    torch.save(weights, folder / "weights.th")


def write_chexbert():
    parts = {"bert": BertModel(config())}
    parts |= {f"linear_heads.{place}": torch.nn.Linear(16, 4 if place < 13 else 2) for place in range(14)}
    weights = {f"module.{part}.{key}": value for part, it in parts.items() for key, value in it.state_dict().items()}
    folder = snapshot("StanfordAIMI/RRG_scorers", CACHE / "chexbert")
    torch.save({"model_state_dict": weights}, folder / "chexbert.pth")


def write_srrbert():
    labels = Path(radeval.__file__).parent / "metrics" / "SRRBert" / "leaves_with_statuses_mapping.json"
    count = len(json.loads(labels.read_text()))
    model = BertForSequenceClassification(config(num_labels=count))
    save(snapshot("StanfordAIMI/SRR-BERT-Leaves-with-Statuses"), model)
    save(snapshot("microsoft/BiomedVLP-CXR-BERT-general"))
    sentences = Path(NLTK) / "tokenizers" / "punkt_tab" / "english"
    sentences.mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
        (sentences / name).touch()


def write_llm(repository, **generation):
    """A language model of random weights, which never writes what GREEN and CRIMSON look for."""
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": len(VOCABULARY)}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, max_position_embeddings=4096, **sizes))
    model.generation_config = GenerationConfig(eos_token_id=3, pad_token_id=0, **generation)
    folder = snapshot(repository)
    save(folder, model)
    tokenizer = BertTokenizerFast.from_pretrained(folder, eos_token="[SEP]", bos_token="[CLS]")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)


torch.manual_seed(0)
write_llm("StanfordAIMI/GREEN-radllama2-7b")
write_llm("rajpurkarlab/medgemma-4b-it-crimson", max_new_tokens=2)
distilbert = DistilBertConfig(dim=16, n_heads=2, n_layers=6, hidden_dim=16, vocab_size=len(VOCABULARY))
save(snapshot("distilbert-base-uncased"), DistilBertModel(distilbert))
write_radgraph("radgraph")
write_radgraph("radgraph-xl")
write_chexbert()
save(snapshot("bert-base-uncased"))
save(snapshot("distilroberta-base"), BertModel(config(layers=6)))
types = dict(enumerate(("O", "B-ABNORMALITY", "I-ABNORMALITY", "B-ANATOMY", "I-ANATOMY")))
entities = BertForTokenClassification(config(id2label=types, label2id={name: place for place, name in types.items()}))
save(snapshot("Angelakeke/RaTE-NER-Deberta"), entities)
save(snapshot("FremyCompany/BioLORD-2023-C"), BertModel(config()))
write_srrbert()
