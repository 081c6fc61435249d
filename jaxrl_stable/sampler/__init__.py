"""μ: the sampler. Rollouts, with or without a cache, and the quantised copies that they run on."""
