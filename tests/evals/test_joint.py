"""Evaluators and tools find in a joint learner what they find in its parts alone."""

import numpy as np
import pytest

from cap_pretrain import evals, inputs, learners
from cap_pretrain.api.model import Model
from cap_pretrain.checkpoints.load import Learner, make_mesh
from cap_pretrain.errors import UserError
from cap_pretrain.evals.base import Context
from tests import tiny, toy

PARTS = {"cap": {"name": "captioner"}, "siglip": {"name": "dual_encoder", "contrast": "sigmoid"}}
CASES = (  # evaluator, options, the part that it uses
    ("retrieval", {"limit": 8}, "siglip"),
    ("composition", {"limit": 8, "part": "cap"}, "cap"),
    ("zero_shot", {"limit": 8}, "siglip"),
    ("captions", {"count": 4}, "cap"),
    ("attention_mass", {"count": 4, "batch_size": 4}, "cap"),
    ("perplexity", {"limit": 4}, "cap"),
)


@pytest.fixture(scope="module")
def both(tokenizer_path):
    """Learners (config, tokenizer, graphdef, variables): the joint one, and each part alone."""
    import jax

    parts = {name: learners.defaults(**part).to_dict() for name, part in PARTS.items()}
    weights = dict.fromkeys(parts, "1")
    c = toy.config("joint", {"parts": parts, "weights": weights}, data__image_size=16)
    tokenizer = inputs.open_tokenizer(c, tokenizer_path)
    graphdef, *variables = tiny.split(c, vocab=tokenizer.vocab_size)
    mesh = make_mesh(jax.devices()[:1])
    variables = jax.device_put(variables, jax.sharding.NamedSharding(mesh, jax.P()))
    found = {"": Learner(c, tokenizer, graphdef, tuple(variables))}
    params = variables[0]
    for name in parts:
        own = toy.config(learner=PARTS[name]["name"], options={}, data__image_size=16)
        with own.unlocked():
            own.learner = c.learner.parts[name]
        alone = {"encoder": params["encoder"], **params["parts"][name]}
        structure = tiny.abstract(own, tokenizer.vocab_size)[0]
        found[name] = Learner(own, tokenizer, structure, (alone, variables[1]))
    return found, mesh


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options", "part"), CASES)
def test_an_evaluator_finds_what_it_finds_in_the_part_alone(both, name, options, part):
    found, mesh = both
    results = []
    for own in ("", part):
        config, tokenizer, graphdef, variables = found[own]
        given = {k: v for k, v in options.items() if not (own and k == "part")}
        evaluator = evals.evaluator_class(name)
        context = Context(config, graphdef, tokenizer, mesh)
        results.append(evaluator(context, evaluator.Options(**given))(variables))
    assert results[0].metrics == results[1].metrics and results[0].metrics
    assert results[0].details.get("part", part) == part


@pytest.mark.slow
def test_a_model_has_the_methods_of_all_parts(both):
    found, _ = both
    model, cap, siglip = (Model(found[name]) for name in ("", "cap", "siglip"))
    assert set(model.methods) == {*cap.methods, *siglip.methods}
    images = tiny.images(3)
    assert model.caption(images) == cap.caption(images)
    np.testing.assert_array_equal(model.embed(images), siglip.embed(images))
    np.testing.assert_array_equal(model.score(images, "a cat"), siglip.score(images, "a cat"))
    with pytest.raises(UserError, match="'cpa' is no part that this joint trains"):
        found[""].able(object, "cpa")
