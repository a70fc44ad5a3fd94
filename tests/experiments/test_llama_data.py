"""From sentences to batches: answer tokens, the shared prefix and truncation."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from blacksmith.datasets import sst2
from blacksmith.errors import ConfigError
from blacksmith.experiments.pytorch.llama.prompts import Encoded, Prompt, collate, encode
from blacksmith.models.pytorch.llama.prefix import IGNORED
from blacksmith.models.pytorch.llama.tokens import byte_tokenizer

LABELS = ("negative", "positive")
TEMPLATE = "Tell the mood.\n\nReview: {sentence}\nSentiment: {label}"
SENTENCES = (
    "a fine film",
    "dull",
    "so very, very long that one falls asleep",
    "naïve – but 😀 charming",
    "{label}",
)


def merging_tokenizer(begin: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on prompts; `begin`: with a begin-of-sequence token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [TEMPLATE.replace("{sentence}", s).replace("{label}", w) for s in SENTENCES for w in LABELS] * 5
    trainer = trainers.BpeTrainer(
        vocab_size=450, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


TOKENIZERS = {
    "bytes": byte_tokenizer,
    "merges": merging_tokenizer,
    "begin": lambda: merging_tokenizer(begin=True),
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    """Each kind of tokenizer."""
    return TOKENIZERS[request.param]()


def as_examples(sentences, labels) -> sst2.Examples:
    return sst2.Examples(tuple(sentences), np.array(labels), np.arange(len(labels)))


def encoded(tokenizer, sentences=SENTENCES, labels=None, template=TEMPLATE, **options) -> Encoded:
    labels = [i % 2 for i in range(len(sentences))] if labels is None else labels
    options = {"max_length": 200, "too_long": "drop", **options}
    return encode(tokenizer, Prompt(template, LABELS), as_examples(sentences, labels), **options)


# --- prompts ---


def test_answers_are_the_label_and_the_end_token(tokenizer):
    found = encoded(tokenizer)
    assert len(found) == len(SENTENCES)
    assert found.truncated == 0
    for row, (tokens, answer) in enumerate(found.correct):
        assert tokens[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(tokens[answer:-1]).strip() == LABELS[row % 2]
        question = tokenizer.decode(tokens[:answer], skip_special_tokens=True)
        expected = TEMPLATE.partition("{sentence}")
        assert question.strip() == (expected[0] + SENTENCES[row] + "\nSentiment: ").strip()


def test_an_answer_that_merges_with_the_space_before_it_is_whole():
    tokenizer = merging_tokenizer()
    # The space is part of the answer's token, so the question alone ends with a different token.
    alone = tokenizer("Review: dull\nSentiment: ")["input_ids"]
    found = encoded(tokenizer, ["dull"], [0])
    tokens, answer = found.correct[0]
    assert tokens[:answer][-1] != alone[-1]
    assert tokenizer.decode(tokens[answer:][:1]).startswith(" ")


def test_a_tokenizer_that_adds_an_end_token_adds_the_only_one():
    tokenizer = merging_tokenizer()
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    ((tokens, _),) = encoded(tokenizer, ["dull"], [0]).correct
    assert tokens.count(tokenizer.eos_token_id) == 1
    assert tokens[-1] == tokenizer.eos_token_id


def test_a_sentence_may_contain_template_fields():
    found = encoded(byte_tokenizer(), ["{label} and {sentence}"], [1])
    assert "{label} and {sentence}" in byte_tokenizer().decode(found.correct[0].ids)


def test_the_shared_prefix_ends_before_the_answer_is_predicted(tokenizer):
    found = encoded(tokenizer)
    prefix = found.shared_prefix()
    text = tokenizer.decode(prefix, skip_special_tokens=True)
    assert TEMPLATE.partition("{sentence}")[0].startswith(text)
    assert len(text) >= len("Tell the mood.\n\nReview:")
    for tokens, answer in found.correct:
        assert tokens[: len(prefix)] == prefix
        assert len(prefix) < answer
    # One more token is not shared.
    assert len({tuple(tokens[: len(prefix) + 1]) for tokens, _ in found.correct}) > 1


def test_a_single_example_shares_all_but_the_predicting_token(tokenizer):
    found = encoded(tokenizer, SENTENCES[:1])
    assert found.shared_prefix() == found.correct[0].ids[: found.correct[0].answer - 1]


def test_nothing_is_shared_if_the_sentence_comes_first():
    assert encoded(byte_tokenizer(), template="{sentence} It was {label}").shared_prefix() == []


def test_long_examples_are_dropped_and_counted(tokenizer):
    lengths = encoded(tokenizer).lengths
    limit = int(sorted(lengths)[2])
    found = encoded(tokenizer, max_length=limit)
    assert found.examples.numbers.tolist() == [i for i, length in enumerate(lengths) if length <= limit]
    assert len(SENTENCES) - len(found) == sum(lengths > limit) > 0
    assert found.truncated == 0
    assert found.lengths.max() <= limit


def test_long_examples_are_truncated_and_counted(tokenizer):
    whole = encoded(tokenizer)
    shortest = int(encoded(tokenizer, [""]).lengths[0])
    for limit in (shortest, shortest + 2, shortest + 5):
        found = encoded(tokenizer, max_length=limit, too_long="truncate")
        assert found.examples.numbers.tolist() == list(range(len(SENTENCES)))
        assert found.truncated == sum(whole.lengths > limit) > 0
        for row, (tokens, answer) in enumerate(found.correct):
            assert len(tokens) <= limit
            assert tokenizer.decode(tokens[answer:-1]).strip() == LABELS[row % 2]
            text = tokenizer.decode(tokens[:answer], skip_special_tokens=True)
            sentence = text.removeprefix("Tell the mood.\n\nReview: ").rsplit("\nSentiment:", 1)[0]
            assert SENTENCES[row].startswith(sentence.strip())
            if whole.lengths[row] > limit:
                # As much as fits: with five more tokens, even a character of four bytes would fit.
                assert len(tokens) >= limit - 5


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("label", [0, 1])
def test_the_longer_answer_decides_what_is_too_long(kind, label):
    tokenizer = TOKENIZERS[kind]()
    prompt = Prompt(TEMPLATE, ("no", "without any doubt at all yes"))
    lengths = [
        [len(tokenizer(prompt.question(s) + a).input_ids) + 1 for a in prompt.labels] for s in SENTENCES
    ]
    assert all(short < long for short, long in lengths)
    for limit in range(min(long for _, long in lengths), max(long for _, long in lengths) + 1):
        examples = as_examples(SENTENCES, [label] * len(SENTENCES))
        found = encode(tokenizer, prompt, examples, max_length=limit, too_long="drop")
        assert found.examples.numbers.tolist() == [i for i, (_, long) in enumerate(lengths) if long <= limit]


def test_answers_that_merge_differently_are_refused():
    tokenizer = merging_tokenizer()

    found = encoded(tokenizer)
    for (one, a), (other, b) in zip(found.correct, found.incorrect):
        assert one[:a] == other[:b]
    # A space and a digit remain two tokens, so the space would be part of only one of the answers.
    with pytest.raises(ConfigError, match=r"this tokenizer merges only one of them with ' ?: ?' before it"):
        encode(
            tokenizer,
            Prompt(TEMPLATE, ("1", "negative")),
            as_examples(SENTENCES, [1] * 5),
            max_length=200,
            too_long="drop",
        )


def test_a_prompt_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match=r"without a sentence, more than llama\.Data\.max_length = 10"):
        encoded(byte_tokenizer(), max_length=10, too_long="truncate")


# --- batches ---


def test_a_batch_follows_the_prefix_and_predicts_the_answers(tokenizer):
    found = encoded(tokenizer)
    for prefix in (found.shared_prefix(), []):
        rows = [2, 0, 4]
        batch = collate([found.correct[row] for row in rows], prefix)
        assert batch.prefix.tolist() == prefix
        width = max(found.lengths[rows]) - 1  # the last token is only predicted
        for place, row in enumerate(rows):
            tokens, answer = found.correct[row]
            assert [*prefix, *batch.tokens[place].tolist()] == (tokens + [0] * width)[:width]
            # Each answer token is the target of the token before it; nothing else is predicted.
            targets = [IGNORED] * (answer - 1) + tokens[answer:] + [IGNORED] * width
            assert batch.targets[place].tolist() == targets[len(prefix) : width]


def test_tokens_are_int64_with_an_empty_prefix():
    batch = collate(encoded(byte_tokenizer()).correct[:1], [])
    assert batch.prefix.dtype == batch.tokens.dtype == batch.targets.dtype == torch.int64
    assert batch.to("cpu").tokens.shape == batch.tokens.shape
