"""The attribute classifier and its balanced accuracy."""

from __future__ import annotations

import torch

from t2idist.evaluate.attribute_classifier import balanced_accuracy, classify, train_classifier, trait_classes
from t2idist.sampling.attribute_edits import NOT_APPLICABLE, TRAITS


def test_balanced_accuracy_weighs_classes_equally() -> None:
    targets = torch.tensor([0] * 90 + [1] * 10 + [NOT_APPLICABLE] * 5)
    assert balanced_accuracy(torch.zeros(105, dtype=torch.int64), targets) == (0.5, 100)
    assert balanced_accuracy(targets.clamp(min=0), targets) == (1.0, 100)


def test_trait_classes_mark_traits_that_do_not_apply() -> None:
    rows = trait_classes([["Blond_Hair", "Skin_Pale", "Eyeglasses"], ["Wearing_Hat", "Skin_Dark", "Beard"]])
    assert rows.tolist() == [[2, 4, 0, 1, 0], [NOT_APPLICABLE, 0, 1, 0, 1]]


def test_classifier_learns_traits_and_leaves_the_global_generator_unchanged() -> None:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 2, (384, len(TRAITS)), generator=generator)
    images = torch.randint(0, 60, (384, 3, 16, 16), generator=generator, dtype=torch.uint8)
    for t in range(len(TRAITS)):
        images[targets[:, t] == 1, :, 3 * t : 3 * t + 3] += 120
    state = torch.random.get_rng_state()
    classifier = train_classifier(images[:256], targets[:256], seed=0, epochs=8, batch_size=32)
    assert torch.equal(state, torch.random.get_rng_state())
    predicted = classify(classifier, images[256:])
    assert min(balanced_accuracy(predicted[:, t], targets[256:, t])[0] for t in range(len(TRAITS))) > 0.9
