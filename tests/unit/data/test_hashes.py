from tokenizers_for_tests import CHATML, GEMMA, make_tokenizer

from lorakit.data.hashes import template_hash, tokenizer_hash


def test_the_template_hash_is_of_the_template_alone():
    assert template_hash(make_tokenizer(None)) is None
    chatml = template_hash(make_tokenizer(CHATML))
    assert chatml == template_hash(make_tokenizer(CHATML, eos="<|im_end|>"))
    assert chatml != template_hash(make_tokenizer(GEMMA))


def test_the_tokenizer_hash_is_of_vocabulary_and_special_tokens():
    first = make_tokenizer(CHATML)
    assert tokenizer_hash(first) == tokenizer_hash(make_tokenizer(GEMMA))
    assert tokenizer_hash(first) != tokenizer_hash(make_tokenizer(CHATML, eos="<|im_end|>"))
    before = tokenizer_hash(first)
    first.add_tokens(["<new>"])
    assert tokenizer_hash(first) != before


def test_the_tokenizer_hash_survives_saving_and_use(tmp_path):
    tokenizer = make_tokenizer(CHATML, pad="</s>")
    before = tokenizer_hash(tokenizer)
    tokenizer(["a", "a longer text"], padding=True, truncation=True, max_length=3)
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_hash(tokenizer) == before
    assert tokenizer_hash(type(tokenizer).from_pretrained(tmp_path)) == before
