"""Who proposes the next strategy: samplers, a Gaussian process, a bandit, a person, a language model."""
