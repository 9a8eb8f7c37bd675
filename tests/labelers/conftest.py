"""Random LLMs for the labeler `llm`, some of which give valid answers."""

import json

import pytest

TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}<s>assistant\n"
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
WORDS = ("present", "absent", "uncertain")


def _write_llm(folder, valid="all", model=None, config=None, seed=0, **fields):
    import torch
    from otdrg.labelers.llm_prompt import ASKED, PROMPT
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    answers = {
        "all": [json.dumps({name: WORDS[place % 3]}) for place, name in enumerate(ASKED)],
        "some": [json.dumps({name: (*WORDS, *["yes"] * 5)[place % 8]}) for place, name in enumerate(ASKED)],
        "none": [],
    }[valid]
    tokens = ByteLevelBPETokenizer()
    tokens.train_from_iterator([PROMPT.read_text(encoding="utf-8")], 500, special_tokens=["<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens._tokenizer, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.add_tokens(answers)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    fields = {"max_position_embeddings": 4096, **SIZES, **fields}
    config = (config or LlamaConfig)(vocab_size=500 + len(answers), initializer_range=0.3, **fields)
    llm = (model or LlamaForCausalLM)(config)
    if answers:
        llm.generation_config.suppress_tokens = list(range(500))
    llm.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def write_llm():
    """Writes a random LLM, by default a LLaMA, that reads 4,096 tokens, and returns its folder.

    Each token it writes is an answer, of which "all" or "some" are valid; with "none" it writes any token.
    """
    return _write_llm
