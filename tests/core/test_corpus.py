"""Every file or folder of the corpus gives exactly the right pixels, count and labels, or one line that names it."""

import numpy as np
import pytest
import torch

from neon.images.formats import open_images
from tests.core.corpus import Case, cases

CASES = cases()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: Case, tmp_path):
    path = case.make(tmp_path)
    if case.error is not None:
        with pytest.raises((ValueError, OSError)) as error:
            read(case, path)
        message = str(error.value)
        assert "\n" not in message
        assert "BytesIO" not in message
        assert len(message) < 600
        for part in case.error.split("|"):
            assert part in message
        return
    images, found = read(case, path)
    assert images.shape == case.images.shape
    assert np.array_equal(images.numpy(), case.images)
    assert len(found.content_hash(range(len(found)))) == 32
    if case.labels is None:
        assert found.labels is None
        assert found.labels_from.startswith("none: ")
    else:
        assert found.labels.tolist() == case.labels
    remarks = found.remarks.sentences()
    assert any(case.remark in sentence for sentence in remarks) if case.remark else not remarks


def read(case: Case, path):
    found = open_images(path, size=case.size, use_labels=case.use_labels)
    return torch.cat(list(found.batches(2))), found


def test_the_corpus_is_large():
    assert len(CASES) >= 150
