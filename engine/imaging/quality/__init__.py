"""How good are synthetic scans, judged by networks that were trained on real ones?

    config.py       what is learned and for how long; weights of others by path and hash
    sides.py        scans of a table on one grid, with label maps, covariates and people
    features.py     the declared extractors: self-supervised encoders in 3D and 2.5D, MedicalNet, RadImageNet
    segmenter.py    a 3D U-Net that learns label maps, and Dice
    classifier.py   a 3D network that learns a categorical covariate
    distances.py    MMD and multi-scale SSIM, real-versus-real floors over many halves
    covariates.py   do predicted covariates agree with those that were asked for?
    utility.py      train on synthetic, test on real, beside train on real, test on real
    assess.py       all of it in order, as findings

What is learned is learned from the real training side alone, and figures are taken on people it has not seen. Distances that
need no network are in `engine.imaging.evaluate`.
"""
