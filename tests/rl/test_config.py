"""Defaults that a paper asks for."""


def test_defaults():
    """23, 31."""
    from pipeline.rl.config import Algorithm, PolicyOptimizer, ValueOptimizer

    assert (
        PolicyOptimizer().eps == ValueOptimizer().eps == 1e-5
        and Algorithm().gamma == 1.0
        and Algorithm().lambda_ == 0.95
    )
