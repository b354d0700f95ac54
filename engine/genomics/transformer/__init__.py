"""A haplotype transformer above a bank of copying chains: what they foretell, mixed and corrected by what was learned.

config      settings; one YAML is one run
features    what the network sees of each site, from the alleles before it
model       the network
train       fit, with leave-one-person-out predictions, on one process or several
run         a fitted model from its run folder: exact likelihood and samples
"""
