"""Rankings that come with the library: they are found by the network, and say how they were made."""

import json

import pytest
import timm
from torch import nn

from trady_triton import make_plan
from trady_triton.models import how_made, ranking_for
from trady_triton.models.shipped import FOLDER

FILES = sorted(FOLDER.glob("*.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_shipped_ranking_is_that_of_its_network(path):
    made = json.loads(path.read_text())["made"]
    model = timm.create_model(made["net"], num_classes=7, **made["args"])
    ranking = ranking_for(model, made["image_size"])
    assert ranking.steps > 10
    assert made["net"] in how_made(model, made["image_size"])
    plan = make_plan(ranking, budget=27946)
    assert 20 < len(plan.pool) < len(plan.shapes)
    assert plan.shapes == {layer.name: layer.shape for layer in ranking.layers}


def test_there_are_some():
    assert len(FILES) >= 1


def test_another_network_or_size_has_none():
    model = timm.create_model("mobilenetv2_w035", norm_layer=nn.Identity, feature_mix=False)
    assert ranking_for(model) is not None
    assert ranking_for(model, 96) is None
    assert ranking_for(timm.create_model("mobilenetv2_w035")) is None  # has a layer more
    assert ranking_for(nn.Linear(3, 2)) is None
    with pytest.raises(ValueError, match="no ranking is shipped"):
        how_made(nn.Linear(3, 2))


def test_make_plan_without_a_ranking_takes_the_shipped_one_and_says_so():
    model = timm.create_model("mobilenetv2_w035", norm_layer=nn.Identity, feature_mix=False)
    with pytest.warns(UserWarning, match="shipped for this network"):
        plan = make_plan(model=model, input_shape=(1, 3, 128, 128), budget=27946)
    assert plan == make_plan(ranking_for(model), budget=27946)


def test_make_plan_without_a_ranking_refuses_what_none_is_shipped_for():
    model = timm.create_model("mobilenetv2_w035", norm_layer=nn.Identity, feature_mix=False)
    with pytest.raises(ValueError, match=r"none is shipped for this .* at image size 96"):
        make_plan(model=model, input_shape=(1, 3, 96, 96), budget=27946)
    with pytest.raises(ValueError, match="none is shipped for this Linear"):
        make_plan(model=nn.Linear(3, 2), budget=27946)
    with pytest.raises(ValueError, match="or the model"):
        make_plan(budget=27946)
