"""The watermark against transformers' processor and detector; "lefthash" is the same scheme."""

import pytest
import torch
from helpers.parity import apart

from alpaca.inference.watermark import Watermark


@pytest.mark.parametrize("gamma, V", [(0.25, 1024), (0.5, 333)])
def test_transformers_marks_and_detects_the_same(gamma, V):
    from transformers import LlamaConfig, WatermarkDetector, WatermarkingConfig

    theirs, ours = WatermarkingConfig(greenlist_ratio=gamma, bias=1.5), Watermark(V, gamma, 1.5)
    ids, logits = torch.randint(3, V, (4, 60)), torch.randn(4, V)
    marked = theirs.construct_processor(V, "cpu")(ids, logits)
    distance = (ours.bias(logits, ids) - marked).abs().max().item()
    apart("watermarked logits: transformers' processor", distance, 0)
    detector = WatermarkDetector(LlamaConfig(vocab_size=V), "cpu", theirs, True)
    found = detector(ids, return_dict=True)
    for row in range(4):
        result = ours.detect(ids[row])
        assert result["green"] == found.num_green_tokens[row]
        distance = abs(result["z"] - found.z_score[row])
        apart("watermark's z: transformers' detector", distance, 1e-12)
        assert result["p"] == pytest.approx(found.p_value[row], rel=1e-6)
