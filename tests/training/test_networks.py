"""The static halves of a run's networks."""

from ivl_jax.training.models import choose_models
from ivl_jax.training.networks import frozen_network, trained_network
from ivl_jax.training.setup import make_run_mesh


def test_a_token_that_a_network_does_not_know_is_read_as_when_decoding(tiny_config):
    mesh = make_run_mesh(tiny_config)
    models = choose_models(tiny_config, mesh)
    trained = trained_network(tiny_config, models, mesh, remat="none")
    assert trained.replacement_id == models.trained.info.replacement_id
    (base,) = models.bases
    assert frozen_network(tiny_config, base, mesh).replacement_id == base.model.info.replacement_id
