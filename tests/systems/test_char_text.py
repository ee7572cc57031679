"""The char-CNN-RNN: spelling, size, loss computed by hand, errors, and learning."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor

from t2idist import systems
from t2idist.config.strict import from_dict
from t2idist.contract import BuildInfo, DataInfo, System
from t2idist.engine.checkpoint import export
from t2idist.losses.matching import joint_embedding_losses
from t2idist.nn.char_encoder import (
    ALPHABET,
    MAX_WORD_CHARACTERS,
    CharEncoder,
    check_spelling,
    encode_characters,
    spell_words,
)
from t2idist.nn.text_encoders import sentence_encoder, text_encoder_from_export
from tests.helpers.fixed_weights import parameters
from tests.systems.test_loss_values import colour_batch, trainer

WORDS = ("<end>", "red", "green", "blue", "yellow", "magenta", "cyan", "white", "black", "a", "the", "x_1", "of",
         "very", "so")  # fmt: skip
TINY = {"embedding_dim": 16, "characters": 60, "widths": (16, 16, 16), "trunk": "small", "trunk_width": 8,
        "image_size": 32}  # fmt: skip


def build_info(words: tuple[str, ...], group_size: int = 8) -> BuildInfo:
    return BuildInfo(group_size, 5, DataInfo(words, 1000))


def build_system(group_size: int = 8, words: tuple[str, ...] = WORDS, **settings: Any) -> System:
    module = systems.load("char_text")
    return module.build(from_dict(module.Config, settings), build_info(words, group_size))


def to_text(characters: Tensor) -> list[str]:
    """Decode rows of character ids."""
    return ["".join(ALPHABET[number - 1] for number in row if number) for row in characters.tolist()]


# ------------------------------------------------------------------------------------------------ spelling
def test_alphabet_is_the_released_one() -> None:
    assert len(ALPHABET) == 70 and len(set(ALPHABET)) == 69 and ALPHABET.count("-") == 2


def test_encode_characters_joins_words_by_single_spaces() -> None:
    tokens = torch.tensor([[9, 1, 11, 0], [5, 0, 0, 0], [10, 12, 10, 4], [9, 9, 9, 9]])
    lengths = torch.tensor([3, 1, 4, 2])
    result = encode_characters(spell_words(WORDS), tokens, lengths, 12)
    expected = ["a red x_1", "magenta", "the of the yellow"[:12], "a a"]
    assert result.shape == (4, 12) and to_text(result) == expected
    assert result[1, 7:].abs().max() == 0


def test_spell_words_drops_unknown_characters_and_truncates() -> None:
    letters = spell_words(["Caf\u00e9", "w" * 40, "", "-"])
    assert letters.shape == (4, MAX_WORD_CHARACTERS) and letters.dtype == torch.uint8
    assert to_text(letters) == ["caf", "w" * MAX_WORD_CHARACTERS, "", "-"]
    assert int(letters[3, 0]) == ALPHABET.rindex("-") + 1, "the last of the two dashes, as in the released code"
    whole = encode_characters(letters, torch.tensor([[1, 1, 1, 1]]), torch.tensor([4]), 201)
    assert to_text(whole) == [" ".join(["w" * MAX_WORD_CHARACTERS] * 4)]


def test_tokens_past_the_length_do_not_change_the_sentence() -> None:
    torch.manual_seed(0)
    net = CharEncoder(WORDS, 8, 60, (6, 6, 6), "gru")
    short = torch.tensor([[1, 9, 0, 0]])
    padded = torch.tensor([[1, 9, 5, 7, 3, 3]])
    length = torch.tensor([2])
    words, sentence = net(short, length)
    assert words.shape == (1, 8, 0) and sentence.shape == (1, 8)
    assert torch.equal(sentence, net(padded, length)[1])
    assert not torch.allclose(sentence, net(padded, torch.tensor([3]))[1])


# ------------------------------------------------------------------------------------------------ size
@pytest.mark.parametrize(("recurrent", "of_recurrent"), [("gru", 3), ("rnn", 1)])
def test_parameter_counts_are_the_published_ones(recurrent: str, of_recurrent: int) -> None:
    with torch.device("meta"):
        system = build_system(group_size=40, recurrent=recurrent)
        text = system.roles["char_text"].net.get_submodule("text")
        shapes = [layer[0].shape for layer in [text.recurrent(torch.randn(2, 18, 512))]]
        through = text.convolutions(torch.randn(2, 70, 201))
    convolutions = 70 * 384 * 4 + 384 + 384 * 512 * 4 + 512 + 512 * 512 * 4 + 512
    steps = of_recurrent * (512 * 512 + 512 * 512 + 2 * 512)
    assert parameters(text) == convolutions + steps + 512 * 1024 + 1024
    if recurrent == "gru":
        assert parameters(text) == 4_045_184
    assert through.shape == (2, 512, 18) and shapes == [(2, 18, 512)]
    trained = sum(
        p.numel() for p in system.roles["char_text"].net.get_submodule("image").parameters() if p.requires_grad
    )
    assert trained == 2048 * 1024 + 1024, "of the image encoder only the projection of the whole image"


# ------------------------------------------------------------------------------------------------ loss
def test_joint_embedding_loss_matches_hand_computation() -> None:
    images = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    sentences = torch.tensor([[1.0, 0.0], [0.5, 1.0], [0.0, 1.0]])
    # scores: image by caption
    #   1    0.5  0
    #   0    2    2
    #   1    1.5  1
    result = joint_embedding_losses(images, sentences, torch.tensor([0, 1, 2]), 1, margin=1.0)
    caption_term = (0.5 + 0) + (0 + 1) + (1 + 1.5)  # row by row, over the own caption
    image_term = (0 + 1) + (0 + 0.5) + (0 + 2)  # column by column, over the own image
    assert result.caption_of_image.item() == pytest.approx(caption_term / 9)
    assert result.image_of_caption.item() == pytest.approx(image_term / 9)
    same = joint_embedding_losses(images, sentences, torch.tensor([0, 1, 1]), 1, margin=1.0)
    assert same.caption_of_image.item() == pytest.approx((0.5 + 0 + 0 + 1) / 9), (
        "samples of the same class are no negatives"
    )
    assert same.image_of_caption.item() == pytest.approx((0 + 1 + 0 + 0) / 9)
    two = joint_embedding_losses(
        torch.cat([images, images]), torch.cat([sentences, sentences]), torch.tensor([0, 1, 2, 0, 1, 1]), 2, margin=1.0
    )
    assert two.sum().item() == pytest.approx((result.sum().item() + same.sum().item()) / 2)


# ------------------------------------------------------------------------------------------------ learning
def test_char_text_learns_to_retrieve_captions() -> None:
    torch.manual_seed(0)
    run = trainer(build_system(**TINY, lr=3e-3, margin=0.3), 8)
    for step in range(150):
        run.run_step(colour_batch((32,), step))
    system: Any = run.system
    nets = run.evaluation_nets()
    batch = colour_batch((32,), step=1000, repeats=4)
    with torch.no_grad():
        codes = system.embed_images(nets, batch.images[-1])
        sentences = system.embed_captions(nets, batch.captions)
    score = codes @ sentences.T
    best = batch.class_ids[score.argmax(1)]
    assert (best == batch.class_ids).float().mean() >= 0.75


# ------------------------------------------------------------------------------------------------ exports
def export_index(system: System, words: tuple[str, ...]) -> dict[str, Any]:
    config: Any = system.config  # type: ignore[attr-defined]
    return {"system": "char_text", "config": asdict(config), "plan": build_info(words).describe()}


def test_exported_encoder_keeps_its_spelling() -> None:
    torch.manual_seed(0)
    system = build_system(**TINY)
    trained = system.roles["char_text"].net.get_submodule("text")
    encoder, dim = sentence_encoder({"text": export_index(system, WORDS)}, len(WORDS), 0)
    assert dim == 16 and encoder is not None
    export.load_into(encoder, trained.state_dict(), "text")
    batch = colour_batch((32,), 3)
    ours, theirs = (net(batch.captions.tokens, batch.captions.lengths)[1] for net in (encoder, trained))
    assert torch.equal(ours, theirs)


def test_build_rejects_invalid_settings() -> None:
    for settings, message in (
        ({"characters": 20}, "characters is 20; it must be at least 48"),
        ({"recurrent": "lstm"}, "recurrent is 'lstm'; it must be one of gru, rnn"),
        ({"trunk": "resnet"}, "trunk is 'resnet'"),
        ({"image_size": 64, "trunk": "inception"}, "image_size is 64; the trunk 'inception' needs at least 75"),
        ({"group_size": 1}, "group_size is 1; char_text compares"),
    ):
        with pytest.raises(ValueError, match=message):
            build_system(**{**TINY, **settings})
    assert build_system(**{**TINY, "characters": 48}) is not None
    index = export_index(build_system(**TINY), WORDS)
    with pytest.raises(ValueError, match=r"uses: text: its vocabulary has 15 words and this data's has 9"):
        sentence_encoder({"text": index}, 9, 0)
    with pytest.raises(ValueError, match="of system 'attngan'; it must be of 'damsm' or 'char_text'"):
        sentence_encoder({"text": {**index, "system": "attngan"}}, 15, 0)
    with pytest.raises(ValueError, match="of system 'char_text'; it must be of 'damsm'"):
        text_encoder_from_export(index, 15)  # for systems that attend to words
    with pytest.raises(ValueError, match=r"uses\.text is missing"):
        sentence_encoder({}, 15, 0)
    assert sentence_encoder({}, 15, 300) == (None, 300)


def test_a_vocabulary_without_letters_of_the_alphabet_is_refused():
    check_spelling(["<end>", "gr\u00fcn", "red", "\u9e1f"])
    with pytest.raises(ValueError, match=r"3 of the data's 4 words, such as '\u7ea2', have no character that"):
        check_spelling(["<end>", "\u7ea2", "\u8272", "\u9e1f"])
