"""Rows and columns of a sheet: interpolated captions, replaced words, styles of images."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from t2idist.contract import Captions, NoiseFn, Sample, is_text_conditional
from t2idist.sampling import axes
from t2idist.sampling.generate import (
    GaussianNoise,
    NoiseSource,
    encode_captions,
    generate,
)
from t2idist.sampling.loading import LoadedExport, load_export
from tests.sampling.conftest import FIRST, ROUNDING, SECOND

CPU = torch.device("cpu")


def load_both(exports: dict[str, str]) -> list[LoadedExport]:
    return [load_export(exports[name], CPU) for name in ("attngan", "stackgan_pp")]


def encode(loaded: LoadedExport, *sentences: str) -> Captions:
    return encode_captions(loaded.vocabulary, list(sentences), loaded.build_info.max_words)


def generate_with(
    loaded: LoadedExport, captions: Captions, noise: NoiseSource, nets: Mapping[str, nn.Module] | None = None
) -> Sample:
    return generate(loaded.system, loaded.nets if nets is None else nets, captions, noise, device=CPU)  # type: ignore[arg-type]


def largest_difference(a: Sample, b: Sample) -> float:
    """Return the largest difference of the images of two samples, over all sizes."""
    return max(float((x - y).abs().max()) for x, y in zip(a.images, b.images, strict=True))


class TokenEncoder(nn.Module):
    """Text encoder with D = 1: a word's feature is its token id, the sentence vector their sum, padding -99."""

    def forward(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        padding = torch.arange(tokens.shape[1]) >= lengths[:, None]
        return tokens.float().masked_fill(padding, -99)[:, None], tokens.sum(1, keepdim=True).float()


def caption(*tokens: int, max_words: int = 5) -> Captions:
    padded = torch.tensor([[*tokens, *[0] * (max_words - len(tokens))]])
    return Captions(padded, torch.tensor([len(tokens)]), torch.zeros(1, 0))


def test_align_words_pairs_words_in_order() -> None:
    (words, sentence), (other_words, other_sentence) = axes.align_words(
        TokenEncoder(), caption(10, 20), caption(1, 2, 3)
    )
    assert words.tolist() == [[[10, 10, 10, 20, 20, 20]]] and sentence.tolist() == [[30]]
    assert other_words.tolist() == [[[1, 1, 2, 2, 3, 3]]] and other_sentence.tolist() == [[6]]


def test_middle_row_has_the_mean_of_word_features_and_sentence_vectors(exports: dict[str, str]) -> None:
    loaded = load_export(exports["stackgan_pp"], CPU)
    loaded.nets["text"] = TokenEncoder()
    captions = Captions(torch.tensor([[10, 20, 0], [1, 2, 3]]), torch.tensor([2, 3]), torch.zeros(2, 0))
    middle = axes.interpolated_rows(loaded, [FIRST, SECOND], captions, 3)[1]
    two = middle.caption.repeat_each(2)
    words, sentence = middle.nets["text"](two.tokens, two.lengths)
    assert words.tolist() == [[[5.5, 5.5, 6, 11, 11.5, 11.5]]] * 2 and sentence.tolist() == [[18]] * 2
    assert middle.caption.lengths.tolist() == [6]


def test_align_words_of_an_encoder_without_word_features() -> None:
    class SentenceOnly(TokenEncoder):
        def forward(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
            words, sentence = super().forward(tokens, lengths)
            return words[:, :, :0], sentence

    (words, _), (other_words, _) = axes.align_words(SentenceOnly(), caption(10, 20), caption(1, 2, 3))
    assert words.shape == other_words.shape == (1, 1, 0)


def test_interpolation_starts_and_ends_at_the_plain_images_without_jumps(exports: dict[str, str]) -> None:
    for loaded in load_both(exports):
        captions, noise = encode(loaded, FIRST, SECOND), GaussianNoise(0, range(3), CPU)
        plain = [generate_with(loaded, captions[i : i + 1].repeat_each(3), noise) for i in range(2)]
        rows = axes.interpolated_rows(loaded, [FIRST, SECOND], captions, 5)
        assert [row.label for row in rows] == [FIRST, "25 % of the way", "50 % of the way", "75 % of the way", SECOND]
        samples = [generate_with(loaded, row.caption.repeat_each(3), noise, row.nets) for row in rows]
        distance = largest_difference(plain[0], plain[1])
        assert distance > 0.01
        assert (
            largest_difference(samples[0], plain[0]) < ROUNDING and largest_difference(samples[-1], plain[1]) < ROUNDING
        )
        steps = [largest_difference(a, b) for a, b in pairwise(samples)]
        assert min(steps) > 0.02 * distance and max(steps) < 0.8 * distance
        near = axes.interpolated_rows(loaded, [FIRST, SECOND], captions, 1001)[1]
        assert (
            largest_difference(generate_with(loaded, near.caption.repeat_each(3), noise, near.nets), plain[0])
            < 0.02 * distance
        )


def test_sentence_vectors_are_interpolated_without_a_text_encoder(exports: dict[str, str]) -> None:
    loaded = load_export(exports["unconditional"], CPU)
    assert not is_text_conditional(loaded.system, loaded.build_info.data.vector_dim)
    captions = dataclasses.replace(encode(loaded, FIRST, SECOND), vectors=torch.tensor([[0.0, 8.0], [4.0, 0.0]]))
    rows = axes.interpolated_rows(loaded, [FIRST, SECOND], captions, 5)
    assert [row.caption.vectors.tolist() for row in rows] == [[[0, 8]], [[1, 6]], [[2, 4]], [[3, 2]], [[4, 0]]]


def test_words_replace_the_placeholder_of_sentences() -> None:
    assert axes.parse_words("red, light blue") == ["red", "light blue"]
    filled = axes.fill_placeholders(["a {} heart", "{} on {}"], ["red", "light blue"])
    assert filled == ["a red heart", "a light blue heart", "red on red", "light blue on light blue"]


class InvertibleSystem:
    """System whose image consists of z and its second noise, so that z can be read from the image."""

    sizes = (4,)

    def sample(self, nets: Mapping[str, nn.Module], captions: Captions, noise: NoiseFn) -> Sample:
        return Sample((torch.cat([noise(24), noise(24)], 1).view(-1, 3, 4, 4),))

    def invert(self, nets: Mapping[str, nn.Module], images: Tensor) -> Tensor:
        return images.flatten(1)[:, :24]


def test_style_columns_replace_z_and_share_all_other_noise(exports: dict[str, str]) -> None:
    loaded = dataclasses.replace(load_export(exports["unconditional"], CPU), system=InvertibleSystem())  # type: ignore[arg-type]
    captions = encode(loaded, FIRST).repeat_each(3)
    images = generate_with(loaded, captions, GaussianNoise(9, range(3), CPU)).images[0]
    columns = axes.style_columns(loaded, images, seed=0, truncation=math.inf)
    assert columns.count == 3 and columns.style_images is not None and torch.equal(columns.style_images, images)
    styled = generate_with(loaded, captions, columns.noise).images[0].flatten(1)
    assert torch.equal(styled[:, :24], images.flatten(1)[:, :24])
    plain = generate_with(loaded, captions[:1], GaussianNoise(0, [0], CPU)).images[0].flatten(1)
    assert torch.equal(styled[:, 24:], plain[:, 24:].expand(3, -1))
