"""Messages to ids: the families' own layout, and no control id out of plain text."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from entropo_ray import chat
from entropo_ray.agent.scripted import ByteChat

CONTROLS = {
    "qwen3": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "glm4_moe": ["[gMASK]", "<sop>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"],
    "gemma3": ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
}


def make(path, kind, *, added_later=()):
    """A model directory with a byte-level BPE, trained in milliseconds."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=CONTROLS[kind],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["<|im_end|> the assistant returns the user value\n" * 9] * 3, trainer)
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in added_later])
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "config.json").write_text(json.dumps({"model_type": kind}))
    return chat.load(path)


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    made = {kind: make(root / kind, kind) for kind in CONTROLS}
    made["thinking"] = make(root / "thinking", "qwen3", added_later=["<think>", "</think>", "<tool_call>", "ordinary"])
    made["bytes"] = ByteChat()
    return made


QWEN = (
    "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n",
    "A<|im_end|>",
    "\n<|im_start|>user\nO<|im_end|>\n<|im_start|>assistant\n",
)
LAYOUT = {
    "qwen3": QWEN,
    "bytes": QWEN,
    "glm4_moe": ("[gMASK]<sop><|system|>\nS<|user|>\nU<|assistant|>", "A<|user|>", "\nO<|assistant|>"),
    "gemma3": (
        "<bos><start_of_turn>user\nS\n\nU<end_of_turn>\n<start_of_turn>model\n",
        "A<end_of_turn>",
        "\n<start_of_turn>user\nO<end_of_turn>\n<start_of_turn>model\n",
    ),
}


@pytest.mark.parametrize("kind", LAYOUT)
def test_a_conversation_reads_as_the_family_writes_it(chats, kind):
    here = chats[kind]
    opening, reply, observation = LAYOUT[kind]
    assert here.decode(here.opening("S", "U")) == opening
    assert here.decode([*here.encode("A"), here.end_ids[0]]) == reply
    assert here.decode(here.observation("O")) == observation
    assert here.observation("O", after=here.end_ids[0]) == here.observation("O")


@pytest.mark.parametrize("kind", ["qwen3", "gemma3", "bytes"])
def test_a_cut_reply_is_closed_before_the_next_message(chats, kind):
    here = chats[kind]
    assert here.observation("O", after=here.encode("x")[-1]) == [here.end_ids[0], *here.observation("O")]
    assert here.observation("O", after=here.end_ids[1]) == [here.end_ids[0], *here.observation("O")]


def test_glm_says_the_role_token_only_where_the_reply_did_not(chats):
    here = chats["glm4_moe"]
    user, observed, end = here.end_ids
    said = here.observation("O")
    assert here.observation("O", after=observed) == said
    assert here.observation("O", after=end) == [user, *said]
    assert here.observation("O", after=here.encode("x")[-1]) == [user, *said]


@pytest.mark.parametrize("kind", ["qwen3", "glm4_moe", "gemma3"])
def test_tokens_equal_those_of_the_tokenizer_on_the_whole_text(chats, kind, tmp_path):
    """A family's template is rendered to text and tokenised at once; ours must give the same ids."""
    make(tmp_path, kind)
    reference = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    opening, reply, observation = LAYOUT[kind]
    here = chats[kind]
    ours = [*here.opening("S", "U"), *here.encode("A"), here.end_ids[0], *here.observation("O")]
    assert ours == reference.encode(opening + reply + observation, add_special_tokens=False).ids


pieces = st.sampled_from(
    [*CONTROLS["qwen3"], *CONTROLS["glm4_moe"], *CONTROLS["gemma3"], "<think>", "</think>", "<tool_call>", "<|", "|>"]
)


@settings(max_examples=150, deadline=None)
@given(st.lists(pieces | st.text(max_size=4), max_size=8).map("".join))
def test_plain_text_never_gives_a_control_id(chats, text):
    for kind, here in chats.items():
        controls = set(getattr(here._words, "_controls", {"": 256}).values()) | set(here.end_ids)
        ids = here.encode(text)
        assert controls.isdisjoint(ids), kind
        assert here.decode(ids) == text, kind


def test_thinking_and_tool_tags_are_control_although_not_special(chats):
    here = chats["thinking"]
    assert here._words.control("<think>") not in here.encode("<think>")
    assert here._words.control("ordinary") is None
    assert len(here.encode("ordinary")) == 1  # other added words keep their own id


def test_messages_of_a_prompt_come_back(chats):
    here = chats["qwen3"]
    ids = here.opening("be\nbrief", "<|im_end|> stays") + here.encode("A reply") + here.observation("seen", after=1)
    assert here.messages(ids) == [
        ("system", "be\nbrief"),
        ("user", "<|im_end|> stays"),
        ("assistant", "A reply"),
        ("user", "seen"),
    ]


def test_an_unknown_family_is_named_with_the_known_ones(tmp_path):
    make(tmp_path, "qwen3")
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ValueError, match=r"mamba.*glm4_moe.*qwen3"):
        chat.load(tmp_path)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json"):
        chat.load(tmp_path)
    make(tmp_path, "qwen3")
    (tmp_path / "config.json").write_text('{"model_type": "gemma3"}')
    with pytest.raises(ValueError, match="<end_of_turn>"):
        chat.load(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        chat.load(tmp_path)
